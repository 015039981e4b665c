"""Layers that the vision encoder and the decoder share."""

import torch
from torch import Tensor, nn

import sail_ops


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, through `sail_ops.rms_norm`."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return sail_ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual) in one pass, through `sail_ops.add_rms_norm`."""
        return sail_ops.add_rms_norm(x, residual, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class LayerNorm(nn.LayerNorm):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension, through `sail_ops.layer_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        return sail_ops.layer_norm(x, self.weight, self.bias, self.eps)


class Linear(nn.Linear):
    """y = x @ weight^T + bias through `sail_ops.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return sail_ops.linear(x, self.weight, self.bias)


def residual_linear(in_features: int, out_features: int, num_layers: int) -> Linear:
    """A Linear that writes to the residual stream of `num_layers` layers, each adding twice.

    Its fresh weights are smaller by sqrt(2 * num_layers), so that the stream does not grow with depth (GPT-2).
    """
    linear = Linear(in_features, out_features, bias=False)
    linear.init_scale = residual_scale(num_layers)  # type: ignore[assignment]
    return linear


def residual_scale(num_layers: int) -> float:
    """What fresh weights that write to the residual stream are multiplied by."""
    return (2 * num_layers) ** -0.5
