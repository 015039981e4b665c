"""Argument checks of every host function, with the messages of csrc/torch/checks.h."""

import os
from typing import NoReturn

import torch
from torch import Tensor

REAL = (torch.float32, torch.bfloat16, torch.float16)
INT32_MAX = 2**31 - 1


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Check:
    """One op's checks: c = Check("rms_norm"); c.rank("x", x, 2); ..."""

    def __init__(self, op: str) -> None:
        self.op = op

    def fail(self, arg: str, given: str, wanted: str) -> NoReturn:
        raise ValueError(f"sail_ops.{self.op}: {arg}: got {given}, expected {wanted}")

    def that(self, good: bool, arg: str, given: str, wanted: str) -> None:
        if not good:
            self.fail(arg, given, wanted)

    def rank(self, arg: str, t: Tensor, n: int) -> None:
        self.that(t.dim() == n, arg, f"shape {list(t.shape)}", f"{n} dimensions")

    def shape(self, arg: str, t: Tensor, *want: int) -> None:
        self.that(t.shape == want, arg, f"shape {list(t.shape)}", f"shape {list(want)}")

    def positive(self, arg: str, name: str, n: int) -> None:
        self.that(n > 0, arg, f"{name} = {n}", f"{name} >= 1")

    def contiguous(self, arg: str, t: Tensor) -> None:
        given = f"a non-contiguous tensor of shape {list(t.shape)}"
        self.that(t.is_contiguous(), arg, given, "a contiguous tensor")

    def real(self, arg: str, t: Tensor) -> None:
        self.that(t.dtype in REAL, arg, name_of(t.dtype), "float32, bfloat16 or float16")

    def dtype(self, arg: str, t: Tensor, want: torch.dtype) -> None:
        self.that(t.dtype == want, arg, name_of(t.dtype), name_of(want))

    def integer(self, arg: str, t: Tensor) -> None:
        self.that(t.dtype in (torch.int32, torch.int64), arg, name_of(t.dtype), "int32 or int64")

    def same_device(self, arg: str, t: Tensor, as_: Tensor) -> None:
        self.that(t.device == as_.device, arg, "a tensor on another device", "all tensors on one device")

    def like(self, arg: str, t: Tensor, as_: Tensor) -> None:
        self.same_device(arg, t, as_)
        self.dtype(arg, t, as_.dtype)
        self.shape(arg, t, *as_.shape)

    def rows(self, arg: str, t: Tensor) -> Tensor:
        """[..., D] as [rows, D] with a stride between rows: a view where there is one such stride, else a copy."""
        self.that(1 <= t.dim() <= 8, arg, f"shape {list(t.shape)}", "1 to 8 dimensions, [..., D]")
        self.positive(arg, "D", t.shape[-1])
        good = t.shape[-1] == 1 or t.stride(-1) == 1 or not t.numel()
        self.that(good, arg, f"stride {t.stride(-1)}", "contiguous rows (a last dimension of stride 1)")
        self.real(arg, t)
        return t.reshape(-1, t.shape[-1])


def check_values() -> bool:
    """Whether to look at values as well, which waits for the device; without it a bad one only gives bad results."""
    return os.environ.get("SAIL_OPS_CHECK") == "1"
