"""A rank's micro-batches, step after step, read and decoded ahead of them by worker processes."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from training.data.batch import Batch, collate
from training.data.conversation import BadRecord
from training.data.parcel import Item, Parcel
from training.data.sample import Samples
from training.data.streams import Drawn, Fault, LogicalStream, Packing, balanced
from training.errors import InputError

PREFETCH = 2  # steps that each worker is ahead


class WorkerDied(RuntimeError):
    """A process that reads data was killed, by the kernel for memory perhaps."""


@dataclass
class LoadedStep:
    """A step's micro-batches of this rank, what went wrong in making them, and what that cost."""

    batches: list[Batch]
    faults: list[Fault]
    records: int  # drawn for them, bad ones too
    padding: float  # share of all positions
    tiles: list[int]  # of each micro-batch
    waited: float = 0.0  # seconds


Made = tuple[LoadedStep, dict[int, dict[str, Any]]]  # and its streams' states behind it


class StreamLoader:
    """Micro-batches of `streams` logical streams, of which this rank reads its share; endless.

    A step takes one row of each stream: micro-batch m of `micro_batches` holds streams m * streams / micro_batches and
    the following, and rank r the r-th part of these. So batches depend on neither `world` nor `workers`. Raises
    InputError where the streams cannot be divided so.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        streams: int,
        capacity: int,
        seed: int,
        pad_id: int,
        micro_batches: int = 1,
        rank: int = 0,
        world: int = 1,
        candidates: int = 64,
        workers: int = 0,
        picture_balance: bool = False,
        blank: bool = False,
    ) -> None:
        if streams % (micro_batches * world):
            raise InputError(
                f"streams: got {streams}, want a multiple of micro_batches x processes, {micro_batches} x {world}"
            )
        self.samples, self.seed, self.streams, self.pad_id = samples, seed, streams, pad_id
        width = streams // (micro_batches * world)
        self.shares = [
            list(range((micro * world + rank) * width, (micro * world + rank + 1) * width))
            for micro in range(micro_batches)
        ]
        self.own = [number for share in self.shares for number in share]
        self.workers = min(workers, len(self.own))
        packing = Packing(capacity, candidates, blank=blank)
        if picture_balance:
            packing = balanced(samples, packing, seed=seed, streams=streams)
        self._stream = partial(LogicalStream, samples, packing, seed=seed, streams=streams)
        self._states: dict[int, dict[str, Any]] = {}
        self._steps: Iterator[Item | Parcel] | None = None
        self._thread = ThreadPoolExecutor(1)
        self._ahead: Future[Made] | None = None

    def next(self) -> LoadedStep:
        """The next step's micro-batches. With workers, the step behind it is received and collated in a thread."""
        began = time.perf_counter()
        step, states = self._made() if self._ahead is None else self._ahead.result()
        self._ahead = self._thread.submit(self._made) if self.workers else None
        self._states.update(states)
        step.waited = time.perf_counter() - began
        return step

    def _made(self) -> Made:
        drawn = self._next_rows()
        batches = [collate([drawn[number].row for number in share], self.pad_id) for share in self.shares]
        positions = sum(batch.input_ids_BL.numel() for batch in batches)
        step = LoadedStep(
            batches=batches,
            faults=[fault for number in self.own for fault in drawn[number].faults],
            records=sum(found.records for found in drawn.values()),
            padding=1 - sum(batch.tokens for batch in batches) / positions,
            tiles=[len(batch.pixels) for batch in batches],
        )
        return step, {number: found.state for number, found in drawn.items()}

    def _next_rows(self) -> dict[int, Drawn]:
        if self._steps is None:
            self._steps = self._start()
        drawn: dict[int, Drawn] = {}
        try:
            for item in islice(self._steps, max(1, self.workers)):
                found = item.opened() if isinstance(item, Parcel) else item
                if isinstance(found, InputError):
                    raise found
                drawn.update(found)
        except (RuntimeError, OSError, EOFError) as error:
            if not (self.workers and _is_of_dead_worker(error)):
                raise
            raise WorkerDied(
                f"data: a worker process died ({error}); --resume goes on from the last checkpoint"
            ) from error
        return drawn

    def _start(self) -> Iterator[Item | Parcel]:
        rows = _Rows(self._stream, self.own, self._states)
        if not self.workers:
            return rows.__iter__()
        loader = DataLoader(
            rows,
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=PREFETCH,
            multiprocessing_context=start_server(),
            worker_init_fn=_start_worker,
        )
        started: Iterator[Item | Parcel] = iter(loader)
        return started

    def state_dict(self) -> dict[str, Any]:
        """Of this rank's streams, for JSON; those of all ranks together are a checkpoint."""
        return {"all": self._described(), **{str(number): self._state(number) for number in self.own}}

    def _described(self) -> dict[str, Any]:
        return {"streams": self.streams, "seed": self.seed, "lengths": list(self.samples.lengths)}

    def _state(self, number: int) -> dict[str, Any]:
        if number in self._states:
            return self._states[number]
        return self._stream(number=number).state_dict()

    def load_state_dict(self, states: dict[str, Any]) -> None:
        """Go on with the very next rows; `states` are those of all ranks, of which this one takes its own.

        Raises InputError where they are of other data, of another seed or of another number of streams.
        """
        if states.get("all") != (described := self._described()):
            raise InputError(f"--resume: the data was read as {states.get('all')}, and is now {described}")
        if missing := [number for number in self.own if str(number) not in states]:
            raise InputError(f"--resume: got no state of streams {missing}, want those of all {self.streams}")
        self.close()
        self._states = {number: states[str(number)] for number in self.own}

    def close(self) -> None:
        """End the worker processes."""
        if self._ahead is not None:
            self._ahead.exception()  # what it has, or what befell it, is of no use any more
        self._ahead = self._steps = None


def start_server() -> ForkServerContext:
    """The context of worker processes. Their server begins to import what they need, if it has not: that takes seconds.

    A fork of this process would copy its threads' locks; the server's forks share one import of torch.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.data.loader"])
    forkserver.ensure_running()
    return context


class _Rows(IterableDataset):
    """Endless rows, an item a step: a worker has every n-th of the rank's streams."""

    def __init__(
        self, stream: Callable[..., LogicalStream], own: Sequence[int], states: dict[int, dict[str, Any]]
    ) -> None:
        self.stream, self.own, self.states = stream, own, states

    def __iter__(self) -> Iterator[Item | Parcel]:
        worker = get_worker_info()
        if worker is None:
            return self._rows(self.own)
        return map(Parcel.of, self._rows(self.own[worker.id :: worker.num_workers]))

    def _rows(self, mine: Sequence[int]) -> Iterator[Item]:
        try:
            made = [self._started(number) for number in mine]
            while True:
                yield [(number, stream.next()) for number, stream in zip(mine, made, strict=True)]
        except InputError as error:
            yield error

    def _started(self, number: int) -> LogicalStream:
        stream = self.stream(number=number)
        if number in self.states:
            try:
                stream.load_state_dict(self.states[number])
            except BadRecord as error:
                raise InputError(f"--resume: data: a sample that waited cannot be read any more: {error}") from error
        return stream


def _is_of_dead_worker(error: Exception) -> bool:
    """Torch's words where it finds a worker gone; where it was gone halfway through a tensor, a connection breaks."""
    if isinstance(error, RuntimeError):
        return "exited unexpectedly" in str(error)
    return "Caught " not in str(error)  # how torch passes on an exception inside a worker


def _start_worker(worker: int) -> None:
    threading.Thread(target=_end_with_trainer, daemon=True).start()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the trainer's to handle


def _end_with_trainer() -> None:
    """A trainer that was killed leaves its fork server, whose fork this is: each of the two would keep the other."""
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    trainer.join()
    os._exit(1)
