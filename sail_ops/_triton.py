"""Which operators Triton serves on CUDA, and their registration; the first call of one of them imports Triton."""

import ctypes
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

OPERATORS = (
    "add_rms_norm",
    "fused_experts",
    "fused_experts_backward",
    "grouped_experts",
    "grouped_experts_backward",
    "grouped_mm",
    "grouped_mm_backward",
    "rms_norm",
    "rms_norm_backward",
    "route_topk",
    "route_topk_backward",
    "swiglu",
    "swiglu_backward",
)

_library = torch.library.Library("sail_ops", "IMPL")


def register(names: Iterable[str], reason: str, key: str = "CUDA") -> None:
    """Triton's kernels for these operators; `reason`: why there are no compiled ones, for the error without Triton."""
    with warnings.catch_warnings():  # of torch, where a compiled kernel without code for the card is replaced
        warnings.simplefilter("ignore")
        for name in names:
            _library.impl(name, _implementation(name, reason), key)


def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _implementation(name: str, reason: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        if not installed():
            raise NotImplementedError(
                f"sail_ops.{name}: no kernel for this device: {reason}, and Triton is not installed;"
                " `pip install triton`, or build the CUDA library: `pip install -e .` where nvcc is on PATH"
            )
        return getattr(importlib.import_module("sail_ops.triton"), name)(*args)

    return call


def cards() -> list[tuple[int, int]]:
    """Compute capability of every NVIDIA card, from the driver's management library: CUDA itself would initialize on
    being asked, and a process that has done so can no longer fork."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return []
    count, found = ctypes.c_uint(), []
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return []
    for i in range(count.value):
        card, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
        if not nvml.nvmlDeviceGetHandleByIndex_v2(i, ctypes.byref(card)):
            nvml.nvmlDeviceGetCudaComputeCapability(card, ctypes.byref(major), ctypes.byref(minor))
            found.append((major.value, minor.value))
    return found


def runs_on(archs: str, card: tuple[int, int]) -> bool:
    """Whether code for "80,90a" runs on the card: on later minors of one major, with a letter on that card alone."""
    major, minor = card
    for arch in archs.split(","):
        number = int(arch.rstrip("af"))
        exact = not arch.isdecimal()
        if number // 10 == major and (number % 10 == minor if exact else number % 10 <= minor):
            return True
    return False
