"""Launching a kernel, and the device it goes to."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import torch


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """kernel on a grid, on torch's current stream; an empty grid is no launch."""
    if 0 not in grid:
        kernel[grid](*args, **constants)


def on_device(op: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the device of the first argument the current one: Triton launches there."""

    @wraps(op)
    def call(first: torch.Tensor | None, *args: Any) -> Any:
        device = next(t for t in (first, *args) if isinstance(t, torch.Tensor)).device
        if device.type != "cuda":
            return op(first, *args)
        with torch.cuda.device(device):
            return op(first, *args)

    return call


@lru_cache
def capability(device: torch.device) -> tuple[int, int]:
    """Of the card; Triton's interpreter, which runs on the CPU, passes for the oldest that is supported."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def blocks(n: int, size: int) -> int:
    return -(-n // size)


def power_of_two(n: int, low: int, high: int) -> int:
    """The smallest one that is at least n, within [low, high]."""
    return min(high, max(low, 1 << max(n - 1, 0).bit_length()))
