"""RMSNorm."""

import torch
from torch import Tensor

from . import _library  # noqa: F401  (registers the operators)

_rms_norm = torch.ops.sail_ops.rms_norm.default


def rms_norm(x: Tensor, weight_D: Tensor, eps: float = 1e-6) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight."""
    return _rms_norm(x, weight_D, eps)
