"""Memory of one training step, measured: what autograd keeps from forward to backward, and the peak above it."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import sail_ops
from benchmarks.cases import DTYPES, MoeCase
from benchmarks.harness import Steps
from benchmarks.layer import Layer


def training_step(layer: Layer, name: str) -> dict[str, int | None]:
    """Bytes, of a step with dW added in place, so that neither weights nor their gradients are counted.

    saved      unique storages that autograd holds after forward, weights left out, x counted
    peak       growth of resident memory during the step, everything counted
    transient  peak, less what must be there: saved without x, y, dx
    *_formula  what the design allows sail_ops: see `formula`; None for the others
    """
    warm = Layer(replace(layer.case, T=1))  # threads, libraries and code pages are there before we look
    warm.prepare(name)
    warm.run(name)
    saved = saved_bytes(layer, name)
    peak = peak_bytes(layer, name)
    needed = saved - layer.x_TD.nbytes + 2 * layer.x_TD.nbytes
    allowed: tuple[int | None, int | None] = (None, None)
    if name.startswith("sail"):
        allowed = formula(layer.case, recompute=name == "sail_recompute")
    return {
        "saved": saved,
        "saved_formula": allowed[0],
        "peak": peak,
        "transient": peak - needed,
        "transient_formula": allowed[1],
        "tokens": layer.case.T,
    }


def peak_bytes(steps: Steps, name: str) -> int:
    """Growth of resident memory during one step, in a process that gives freed memory back (worker.EXACT_MEMORY)."""
    steps.prepare(name)
    sail_ops.empty_cache()  # else buffers kept from the step before would hide the transient ones
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS, see man 5 proc
    before = resident_bytes("VmRSS")
    steps.run(name)
    return resident_bytes("VmHWM") - before


def formula(case: MoeCase, *, recompute: bool) -> tuple[int, int]:
    """(saved, transient) bytes that the design allows: in bf16 2D + 4FK and 2DK + 6FK a token.

    Saved besides: int64 ids, routing weights, and a permutation of two int32 a routed row and an offset an expert.
    """
    s, size = case.sizes, DTYPES[case.dtype].itemsize
    routed = case.T * s.K
    activations = 0 if recompute else routed * 2 * s.F
    index = routed * (8 + size + 2 * 4) + 4 * (s.E + 1)
    return size * (case.T * s.D + activations) + index, size * routed * (s.D + 3 * s.F)


def saved_bytes(layer: Layer, name: str) -> int:
    """Sum over the unique storages packed for backward that belong to no weight."""
    layer.prepare(name)
    weights = {w.untyped_storage().data_ptr() for w in layer.weights}
    if layer.buffers:
        weights |= {b.untyped_storage().data_ptr() for pair in layer.buffers.values() for b in pair}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer.forward(name)
    return sum(sizes.values())


@contextmanager
def malloc_keeps() -> Iterator[None]:
    """Freed memory stays with this process, as with the allocators that training runs use (jemalloc, tcmalloc).

    glibc's malloc maps and unmaps every tensor of more than 32 MiB: page by page, that takes longer than filling it.
    """
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    yield
    mallopt(mmap_max, 65536)
    mallopt(mmap_threshold, 32 << 20)  # where glibc's own adjustment ends
    mallopt(trim_threshold, 64 << 20)


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")
