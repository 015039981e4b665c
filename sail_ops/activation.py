"""SwiGLU, the gated activation of the dense feed-forward layers (the expert layers fuse their own)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _library  # noqa: F401  (registers the operators)
from ._autograd import in_autocast, needs_grad, promote

_swiglu = torch.ops.sail_ops.swiglu.default
_swiglu_backward = torch.ops.sail_ops.swiglu_backward.default


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """y = silu(gate) * up, silu(g) = g / (1 + exp(-g)); computed in fp32, rounded once.

    gate, up: [..., F], of one shape and dtype (fp32, bf16 or fp16; under autocast the wider one is taken), with
    contiguous rows: the halves `gate_up.chunk(2, -1)` of one projection cost no copy. Returns a contiguous tensor.
    Saved for backward: gate and up.
    On CUDA: the compiled kernels take rows at one distance, as `rms_norm`; Triton's copy others first.
    Raises ValueError for other shapes, dtypes or strides.
    Source: Shazeer 2020, "GLU Variants Improve Transformer".
    """
    if in_autocast(gate):
        gate, up = promote(gate, up)
    if needs_grad("swiglu", gate, up):
        return _SwiGLU.apply(gate, up)
    return _swiglu(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate, up = ctx.saved_tensors
        dgate, dup = _swiglu_backward(grad.contiguous(), gate, up)
        return dgate, dup


@torch.library.register_fake("sail_ops::swiglu")
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.register_fake("sail_ops::swiglu_backward")
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)
