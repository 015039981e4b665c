"""The kernels that a step launches on a card, as torch's profiler sees them: symbols, and when each of ours ran."""

from collections.abc import Iterable
from statistics import median
from typing import Any, NamedTuple

import torch

from benchmarks import events
from benchmarks.harness import Steps

SESSIONS = 3  # whose median a launch's time is
SYMBOL, NAME = 240, 120  # characters kept: of ours up to the epilogue, which tells one product from another
SPIN = "spin_kernel"  # torch.cuda._sleep's


class Launch(NamedTuple):
    """A kernel's symbol without its parameters, and its milliseconds after the first one's start."""

    symbol: str
    start: float
    end: float


def facts(steps: Steps, implementations: Iterable[str]) -> dict[str, Any]:
    """For a row, by name: the kernels of each, and every launch of ours. What the profiler cannot do is said in the
    row and costs it no time that was measured."""
    found: dict[str, Any] = {"kernels": {}, "launches": {}}
    for name in implementations:
        try:
            found["kernels"][name] = names(steps, name)
            if name.startswith("sail"):
                found["launches"][name] = launches(steps, name)
        except Exception as error:
            found.setdefault("kernels_failed", {})[name] = f"{type(error).__name__}: {error}"[:300]
    return found


def names(steps: Steps, name: str) -> list[str]:
    """The kernels of one step in the order of their launches, each once; none where there is no card."""
    return list(dict.fromkeys(launch.symbol[:NAME] for launch in session(steps, name)))


def launches(steps: Steps, name: str) -> list[Launch]:
    """Every kernel of one step with the median of its times over a few sessions; none where there is no card."""
    sessions = [session(steps, name) for _ in range(SESSIONS)]
    symbols = [[launch.symbol for launch in found] for found in sessions]
    if symbols != [symbols[0]] * SESSIONS:
        raise RuntimeError(f"launches of {name!r} differ from one step to the next: {symbols}")
    times = [list(zip(*(launch[1:] for launch in same), strict=True)) for same in zip(*sessions, strict=True)]
    return [Launch(symbol, *map(median, time)) for symbol, time in zip(symbols[0], times, strict=True)]


def session(steps: Steps, name: str) -> list[Launch]:
    """One step under the profiler, with a cold cache and the device busy while the host launches, as it is timed."""
    if events.DEVICE != "cuda":
        return []
    steps.prepare(name)
    clock = events.Events()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        clock.time(lambda: steps.run(name))
    return after_spin([event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA])


def after_spin(found: list[torch.autograd.profiler_util.FunctionEvent]) -> list[Launch]:
    """The step's kernels among a device's events: neither copies and fills by its engines, nor what came before."""
    found = sorted(found, key=lambda event: float(event.time_range.start))
    spun = max((i for i, event in enumerate(found) if SPIN in event.name), default=-1)
    step = [event for event in found[spun + 1 :] if not event.name.startswith(("Memcpy", "Memset"))]
    ranges = [(event, event.time_range.start, event.time_range.end) for event in step]
    origin = ranges[0][1] if ranges else 0.0
    return [Launch(symbol(event.name), 1e-3 * (a - origin), 1e-3 * (b - origin)) for event, a, b in ranges]


def symbol(demangled: str) -> str:
    """Without the parameters, whose parenthesis is the last that is outside of template arguments."""
    depth = 0
    for i, c in enumerate(demangled):
        if c == "(" and depth == 0 and not demangled.startswith("(anonymous namespace)", i):
            demangled = demangled[:i]
            break
        depth += (c == "<") - (c == ">")
    return demangled.removeprefix("void ")[:SYMBOL]
