"""A row of a benchmark on a card: ours first, kept at once, then all implementations by turns, and what ran."""

from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import events, journal, kernels
from benchmarks.harness import MAX_ROUNDS, MIN_ROUNDS, Steps, record

ONCE = ("stock_eager",)  # 0.3 s a step on a card, and an artefact: each W[e] builds a zero gradient of W's full size


def measure(
    benchmark: BenchmarkFixture, steps: Steps, peers: list[str], *, budget: float, row: dict[str, Any]
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of every round by name, ours ("sail") first; and the row's facts, `row` (family, kind, case) among them.

    Ours is timed alone in a quarter of the budget, and the row kept; then it takes turns with those peers that run
    here, whose medians the row is made of. A peer of ONCE has one turn, outside of the rounds. pytest-benchmark's own
    columns are the wall clock of a few more steps of ours, launches and wait included.
    """
    clock = events.Events()
    alone = rounds(clock, steps, ["sail"], budget / 4)
    record(benchmark, alone, **row, **events.state())
    journal.write(benchmark.name, benchmark.extra_info, "ours alone")

    runs, not_measured = usable(steps, peers)
    samples = rounds(clock, steps, ["sail", *(name for name in runs if name not in ONCE)], budget)
    state = events.state()
    samples |= {name: [clock.step(steps, name)] for name in runs if name in ONCE}
    found = row | state | kernels.facts(steps, samples) | {"not_measured": not_measured}

    def run() -> None:
        steps.run("sail")
        torch.cuda.synchronize()

    benchmark.pedantic(run, setup=lambda: steps.prepare("sail"), rounds=MIN_ROUNDS)
    return samples, found


def rounds(
    clock: events.Events, steps: Steps, names: list[str], budget: float, least: int = MIN_ROUNDS, most: int = MAX_ROUNDS
) -> dict[str, list[float]]:
    """Seconds of every turn, each name's turn once a round, in as many rounds as `budget` seconds hold."""
    for name in names:
        clock.step(steps, name)  # compiles, tunes, allocates
    count = 1
    if most > 1:
        once = sum(clock.step(steps, name) for name in names)
        count = min(most, max(least, int(budget / once)))
    samples: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(count):
        for name in names:
            samples[name].append(clock.step(steps, name))
    return samples


def usable(steps: Steps, peers: list[str]) -> tuple[list[str], dict[str, str]]:
    """Peers that can run a step, and why the others cannot: a package that is missing, a case they do not take."""
    why = {name: failure(steps, name) for name in peers}
    return [name for name in peers if not why[name]], {name: reason for name, reason in why.items() if reason}


def failure(steps: Steps, name: str) -> str:
    """Why a step does not run here, in a line (Triton finds no C compiler, out of memory, ...); "" if it does."""
    try:
        steps.prepare(name)
        steps.run(name)
        if events.DEVICE == "cuda":
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
