"""Timing on a card: CUDA events around a step, the second-level cache overwritten before it."""

from collections.abc import Callable
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import MAX_ROUNDS, MIN_ROUNDS, Steps

DEVICE = "cuda"
FLUSH_BYTES = 256 << 20  # an H100's second-level cache holds 50 MB


class Events:
    """A clock whose `time` is the device's: from when the step's first kernel may start to when its last has ended.

    Overwriting the cache keeps the device busy while the host prepares the step's launches, so launches are counted
    only as far as they cannot keep up.
    """

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=DEVICE)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time(self, function: Callable[[], object]) -> float:
        """Seconds of one call."""
        self._flush.zero_()
        self._start.record()
        function()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3

    def step(self, steps: Steps, name: str) -> float:
        """Seconds of one step, prepared outside of the clock."""
        steps.prepare(name)
        return self.time(lambda: steps.run(name))

    def best_of(self, function: Callable[[], object], repeats: int = 8) -> float:
        """Seconds of the fastest call: for limits."""
        return min(self.time(function) for _ in range(repeats))


def interleave(
    benchmark: BenchmarkFixture, steps: Steps, ours: str, peers: list[str], *, budget: float
) -> dict[str, list[float]]:
    """`harness.interleave` by events: seconds of every round by name, all implementations once a round.

    pytest-benchmark's own columns are the wall clock of a few more steps of ours, launches and wait included.
    """
    events = Events()
    names = [ours, *peers]
    for name in names:
        events.step(steps, name)  # compiles, tunes, allocates
    once = sum(events.step(steps, name) for name in names)
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(budget / once)))
    samples: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            samples[name].append(events.step(steps, name))

    def run() -> None:
        steps.run(ours)
        torch.cuda.synchronize()

    benchmark.pedantic(run, setup=lambda: steps.prepare(ours), rounds=MIN_ROUNDS)
    return samples


def measure(
    benchmark: BenchmarkFixture, steps: Steps, peers: list[str], *, budget: float
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """`interleave` of "sail" and those peers that run here, and why the others do not, for the row's facts."""
    runs, not_measured = usable(steps, peers)
    return interleave(benchmark, steps, "sail", runs, budget=budget), {"not_measured": not_measured}


def usable(steps: Steps, peers: list[str]) -> tuple[list[str], dict[str, str]]:
    """Peers that can run a step, and why the others cannot: a package that is missing, a case they do not take."""
    why = {name: failure(steps, name) for name in peers}
    return [name for name in peers if not why[name]], {name: reason for name, reason in why.items() if reason}


def failure(steps: Steps, name: str) -> str:
    """Why a step does not run here, in a line (Triton finds no C compiler, out of memory, ...); "" if it does."""
    try:
        steps.prepare(name)
        steps.run(name)
        torch.cuda.synchronize()
    except Exception as error:
        torch.cuda.empty_cache()
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return ""


def peak_memory(steps: Steps, name: str) -> int:
    """Bytes that one step takes above what is there before it: saved tensors, results, workspaces."""
    steps.prepare(name)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    steps.run(name)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
