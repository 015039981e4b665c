"""What the public functions share: when a gradient is needed, and what autocast does to mixed dtypes."""

from functools import reduce

import torch
from torch import Tensor


def needs_grad(*tensors: Tensor | None) -> bool:
    """An autograd.Function is worth its cost only then."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def in_autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def promote(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts to the widest dtype among them, as torch's own element-wise operators do under autocast."""
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors))
    return tuple(t.to(dtype) for t in tensors)
