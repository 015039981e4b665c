"""Timing on a card: CUDA events around a step, the second-level cache overwritten before it; clock, power, kernels."""

import ctypes
import time
from collections.abc import Callable
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import MAX_ROUNDS, MIN_ROUNDS, Steps

DEVICE = "cuda"
FLUSH_BYTES = 256 << 20  # an H100's second-level cache holds 50 MB
AHEAD_CYCLES = 2_000_000  # about 1 ms at 1 to 2 GHz: what the host has to launch a step before the device begins
SM_CLOCK = 1  # NVML_CLOCK_SM


class Events:
    """A clock whose `time` is the device's: from when the step's first kernel may start to when its last has ended.

    Overwriting the cache and a wait keep the device busy while the host launches the step, so launches are counted only
    as far as they take longer than these.
    """

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=DEVICE)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time(self, function: Callable[[], object]) -> float:
        """Seconds of one call."""
        self._flush.zero_()
        torch.cuda._sleep(AHEAD_CYCLES)
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


class WallClock(Events):
    """In its place where there is no card."""

    def __init__(self) -> None:
        pass

    def time(self, function: Callable[[], object]) -> float:
        """Seconds of one call."""
        start = time.perf_counter()
        function()
        return time.perf_counter() - start


def state() -> dict[str, Any]:
    """The card's clock in MHz and power in W at this moment, by its management library; nothing where there is none."""
    if DEVICE != "cuda":
        return {}
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return {}
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}".encode()
    card, clock, power = ctypes.c_void_p(), ctypes.c_uint(), ctypes.c_uint()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(card)):
        return {}
    found: dict[str, Any] = {}
    if not nvml.nvmlDeviceGetClockInfo(card, SM_CLOCK, ctypes.byref(clock)):
        found["clock_mhz"] = clock.value
    if not nvml.nvmlDeviceGetPowerUsage(card, ctypes.byref(power)):
        found["power_w"] = power.value / 1e3
    return found


def kernel_names(steps: Steps, name: str) -> list[str]:
    """The kernels of one step in the order of their launches, each once."""
    if DEVICE != "cuda":
        return []
    steps.prepare(name)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        steps.run(name)
        torch.cuda.synchronize()
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    return list(dict.fromkeys(event.name[:120] for event in events if "Memcpy" not in event.name))


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
        if DEVICE == "cuda":
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
