"""Timing on a card: CUDA events around a step, the second-level cache overwritten before it; clock and power."""

import ctypes
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import Steps

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
