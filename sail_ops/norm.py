"""RMSNorm and LayerNorm, alone and fused with the residual addition before them."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _library  # noqa: F401  (registers the operators)
from ._autograd import in_autocast, needs_grad, promote

_rms_norm = torch.ops.sail_ops.rms_norm.default
_add_rms_norm = torch.ops.sail_ops.add_rms_norm.default
_rms_norm_backward = torch.ops.sail_ops.rms_norm_backward.default
_layer_norm = torch.ops.sail_ops.layer_norm.default
_add_layer_norm = torch.ops.sail_ops.add_layer_norm.default
_layer_norm_backward = torch.ops.sail_ops.layer_norm_backward.default


def rms_norm(x: Tensor, weight_D: Tensor, eps: float = 1e-6) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension; reduced in fp32, rounded once.

    x: [..., D], fp32, bf16 or fp16, with contiguous rows: a view such as x[:, :D] costs no copy.
    weight_D: [D], in x's dtype; under autocast it is cast to it. Returns a contiguous tensor like x.
    Saved for backward: x and the weight. The weight's gradient is the same for any number of threads.
    On CUDA: the compiled kernels take at most 2^31 - 1 rows, all at one distance: a contiguous tensor, or x[:, :D] of a
    wider one, but not x[:, :7] of [B, S, D], which Triton's copy first.
    Raises ValueError for other shapes, dtypes or strides.
    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
    """
    if in_autocast(x):
        weight_D = weight_D.to(x.dtype)
    if needs_grad("rms_norm", x, weight_D):
        return _RmsNorm.apply(x, weight_D, eps)
    return _rms_norm(x, weight_D, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """s = x + residual, rounded to their dtype; returns (rms_norm(s, weight_D, eps), s).

    x, residual: [..., D], of one dtype (under autocast the wider one is taken). weight_D as for `rms_norm`.
    Saved for backward: s and the weight. The backward adds the gradient of s in the same pass.
    On CUDA: rows of x and of residual as `rms_norm`.
    Raises ValueError for other shapes, dtypes or strides.
    """
    if in_autocast(x):
        x, residual = promote(x, residual)
        weight_D = weight_D.to(x.dtype)
    if needs_grad("add_rms_norm", x, residual, weight_D):
        return _AddRmsNorm.apply(x, residual, weight_D, eps)
    return _add_rms_norm(x, residual, weight_D, eps)


def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, over the last dimension, var that of the population.

    x: [..., D], fp32, bf16 or fp16, with contiguous rows. weight_D, bias_D: [D], in x's dtype; under autocast they are
    cast to it. Reduced in fp32, rounded once. Returns a contiguous tensor like x.
    Saved for backward: x and the weight. The gradients are the same for any number of threads.
    On CUDA: rows as `rms_norm`; Triton has no kernel for it.
    Raises ValueError for other shapes, dtypes or strides.
    Source: Ba et al. 2016, "Layer Normalization".
    """
    if in_autocast(x):
        weight_D, bias_D = weight_D.to(x.dtype), None if bias_D is None else bias_D.to(x.dtype)
    if needs_grad("layer_norm", x, weight_D, bias_D):
        return _LayerNorm.apply(x, weight_D, bias_D, eps)
    return _layer_norm(x, weight_D, bias_D, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight_D: Tensor, bias_D: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """s = x + residual, rounded to their dtype; returns (layer_norm(s, weight_D, bias_D, eps), s).

    x, residual: [..., D], of one dtype (under autocast the wider one is taken). The rest as for `layer_norm`.
    Saved for backward: s and the weight. The backward adds the gradient of s in the same pass.
    On CUDA: rows of x and of residual as `layer_norm`.
    Raises ValueError for other shapes, dtypes or strides.
    """
    if in_autocast(x):
        x, residual = promote(x, residual)
        weight_D, bias_D = weight_D.to(x.dtype), None if bias_D is None else bias_D.to(x.dtype)
    if needs_grad("add_layer_norm", x, residual, weight_D, bias_D):
        return _AddLayerNorm.apply(x, residual, weight_D, bias_D, eps)
    return _add_layer_norm(x, residual, weight_D, bias_D, eps)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight_D)
        ctx.eps = eps
        return _rms_norm(x, weight_D, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad[:2]
        dx, dweight = _rms_norm_backward(grad.contiguous(), None, x, weight_D, ctx.eps, need_x, need_weight)
        return dx if need_x else None, dweight if need_weight else None, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, total = _add_rms_norm(x, residual, weight_D, eps)
        ctx.save_for_backward(total, weight_D)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight_D = ctx.saved_tensors
        need_x, need_residual, need_weight = ctx.needs_input_grad[:3]
        if grad is None:  # only the sum was used
            return (grad_total if need_x else None), (grad_total if need_residual else None), None, None
        grad_total = None if grad_total is None else grad_total.contiguous()
        need_sum = need_x or need_residual
        dx, dweight = _rms_norm_backward(grad.contiguous(), grad_total, total, weight_D, ctx.eps, need_sum, need_weight)
        return dx if need_x else None, dx if need_residual else None, dweight if need_weight else None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight_D)
        ctx.eps = eps
        return _layer_norm(x, weight_D, bias_D, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        grads = _layer_norm_backward(grad.contiguous(), None, x, weight_D, ctx.eps, *needed)
        return *(g if need else None for g, need in zip(grads, needed, strict=True)), None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        y, total = _add_layer_norm(x, residual, weight_D, bias_D, eps)
        ctx.save_for_backward(total, weight_D)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight_D = ctx.saved_tensors
        need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
        if grad is None:  # only the sum was used
            return (grad_total if need_x else None), (grad_total if need_residual else None), None, None, None
        grad_total = None if grad_total is None else grad_total.contiguous()
        needed = need_x or need_residual, need_weight, need_bias
        dx, dweight, dbias = _layer_norm_backward(grad.contiguous(), grad_total, total, weight_D, ctx.eps, *needed)
        dx_or_none, dr_or_none = (dx if need_x else None), (dx if need_residual else None)
        return dx_or_none, dr_or_none, dweight if need_weight else None, dbias if need_bias else None, None


@torch.library.register_fake("sail_ops::rms_norm")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("sail_ops::add_rms_norm")
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.register_fake("sail_ops::rms_norm_backward")
def _(
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    eps: float,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_dx else 0), x.new_empty(weight.shape if need_dweight else 0)


@torch.library.register_fake("sail_ops::layer_norm")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("sail_ops::add_layer_norm")
def _(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.register_fake("sail_ops::layer_norm_backward")
def _(
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    eps: float,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = (
        t.new_empty(t.shape if need else 0) for t, need in ((x, need_dx), (weight, need_dweight), (weight, need_dbias))
    )
    return dx, dweight, dbias
