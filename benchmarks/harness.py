"""Interleaved timing: every round runs all implementations once, so that a slow minute slows all of them.

pytest-benchmark times ours; its `setup` hook, which runs before every round, times the peers with the same clock.
"""

import gc
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, Protocol

from pytest_benchmark.fixture import BenchmarkFixture

MIN_ROUNDS, MAX_ROUNDS = 3, 64


class Steps(Protocol):
    """What is timed: `prepare` outside the clock, `run` inside."""

    def prepare(self, name: str) -> None: ...

    def run(self, name: str) -> None: ...


def timed(steps: Steps, name: str) -> float:
    """Seconds of one step, the garbage collector held off as pytest-benchmark does for ours."""
    steps.prepare(name)
    gc.disable()
    start = time.perf_counter()
    steps.run(name)
    elapsed = time.perf_counter() - start
    gc.enable()
    return elapsed


def interleave(
    benchmark: BenchmarkFixture, steps: Steps, ours: str, peers: list[str], *, budget: float, warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of every round by name. As many rounds as `budget` seconds hold, 3 to 64; one if not warmed up."""
    rounds = 1
    if warm_up:
        # the first step of a shape also allocates, packs and starts threads; where it is slow, it tells enough
        once = sum(timed(steps, name) for name in (*peers, ours))
        if once * MIN_ROUNDS < budget:
            once = sum(timed(steps, name) for name in (*peers, ours))
        rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(budget / once)))
    samples: dict[str, list[float]] = {name: [] for name in peers}

    def before_ours() -> None:
        for name in peers:
            samples[name].append(timed(steps, name))
        steps.prepare(ours)

    benchmark.pedantic(lambda: steps.run(ours), setup=before_ours, rounds=rounds)
    return {ours: list(benchmark.stats.stats.data), **samples}


def alternate(
    steps: Steps, names: list[str], budget: float, clock: Callable[[Steps, str], float] = timed
) -> dict[str, float]:
    """Median seconds by name, in as many rounds of all names as `budget` seconds hold, 3 to 64, after a warm-up."""
    once = sum(clock(steps, name) for name in names)
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(budget / once)))
    samples = [[clock(steps, name) for name in names] for _ in range(rounds)]
    return {name: median(times) for name, times in zip(names, zip(*samples, strict=True), strict=True)}


def record(benchmark: BenchmarkFixture, samples: Mapping[str, list[float]], **facts: Any) -> None:
    """Put medians, ratios (a peer's time over ours, the first of `samples`) and `facts` into the row's extra_info."""
    medians = {name: median(data) for name, data in samples.items()}
    ours = next(iter(samples))
    benchmark.extra_info.update(
        ms={name: 1e3 * t for name, t in medians.items()},
        speedup={name: t / medians[ours] for name, t in medians.items() if name != ours},
        samples={name: list(data) for name, data in samples.items()},
        **facts,
    )


def best_of(function: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest call: for limits, which no noise can make too high."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)
