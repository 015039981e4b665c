"""What the operators share: when and which gradients are needed, and what autocast does to mixed dtypes."""

from collections.abc import Iterable
from enum import IntFlag
from functools import reduce

import torch
from torch import Tensor
from torch.autograd import forward_ad


class Need(IntFlag):
    """Bits of `needs` of the expert layer's backward: which gradients are wanted; csrc/torch/moe.h has the same."""

    X = 1
    GATE_UP = 2
    DOWN = 4
    WEIGHTS = 8
    GATE_UP_BIAS = 16
    DOWN_BIAS = 32
    OVERWRITE = 64  # main gradients are set, not added to


def needs_grad(op: str, *tensors: Tensor | None, constants: Iterable[Tensor | None] = ()) -> bool:
    """Whether a gradient of one of `tensors` is wanted: an autograd.Function is worth its cost only then.

    constants: inputs that have no gradient. Raises NotImplementedError where any input carries a tangent: without a
    Function in between, torch would drop it and return derivatives of zero.
    """
    if forward_ad._current_level >= 0 and any(map(_has_tangent, (*tensors, *constants))):
        raise NotImplementedError(
            f"sail_ops.{op}: got an input with a tangent, but there are no forward-mode derivatives (torch.func.jvp,"
            " jacfwd, torch.autograd.forward_ad); use reverse mode, or the same function of sail_ops.reference"
        )
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _has_tangent(t: Tensor | None) -> bool:
    return t is not None and forward_ad.unpack_dual(t).tangent is not None


def in_autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def promote(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts to the widest dtype among them, as torch's own element-wise operators do under autocast."""
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors))
    return tuple(t.to(dtype) for t in tensors)
