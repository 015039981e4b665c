"""A layer in a process of its own, for what only the environment at process start can set: the allocator.

The parent times a remote step like a local one; a message there and back takes 0.1 ms, a step 100 ms and more.
"""

import multiprocessing
import os
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks import memory
from benchmarks.cases import MoeCase
from benchmarks.harness import Steps
from benchmarks.layer import Layer

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
# every buffer from 64 KiB up comes from mmap and goes back at once, so that resident memory is what is in use
EXACT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


class Worker:
    """A spawned process with `environment` added to ours; it holds one layer at a time."""

    def __init__(self, environment: Mapping[str, str]):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, torch.get_num_threads()), daemon=True)
        before = dict(os.environ)
        os.environ.update(environment)
        try:
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()

    def layer(self, case: MoeCase) -> "RemoteLayer":
        """Build the layer of `case` over there, in place of the one before."""
        self.build(Layer, case)
        return RemoteLayer(self)

    def build(self, kind: type[Steps], *args: Any) -> None:
        """Have `kind(*args)` over there answer the next calls, in place of the one before."""
        self.call("build", kind, *args)

    def call(self, method: str, *args: Any) -> Any:
        """Run `method` over there and wait for what it returns."""
        self._connection.send((method, args))
        try:
            return self._connection.recv()
        except EOFError:
            raise RuntimeError(f"benchmark worker ended in {method}{args}; its traceback is on stderr") from None

    def close(self) -> None:
        """End the process; it holds nothing worth an orderly exit."""
        self._process.terminate()
        self._process.join()


class RemoteLayer:
    """`Layer`'s methods, in the worker."""

    def __init__(self, worker: Worker):
        self._worker, self.hit = worker, worker.call("hit")

    def prepare(self, name: str) -> None:
        """`Layer.prepare`."""
        self._worker.call("prepare", name)

    def run(self, name: str) -> None:
        """`Layer.run`."""
        self._worker.call("run", name)

    def memory(self, name: str) -> dict[str, int | None]:
        """`memory.training_step` of the layer."""
        return self._worker.call("training_step", name)


def _serve(connection: Connection, threads: int) -> None:
    torch.set_num_threads(threads)
    steps: Any = None
    while True:
        try:
            method, args = connection.recv()
        except EOFError:
            return
        result: Any = None
        if method == "build":
            steps = None  # freed before the next one is made
            steps = args[0](*args[1:])
        elif method == "hit":
            result = steps.hit
        elif method in ("training_step", "peak_bytes"):
            result = getattr(memory, method)(steps, *args)
        else:
            getattr(steps, method)(*args)
        connection.send(result)
