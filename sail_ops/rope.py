"""Rotary position embedding of q and k, alone and fused with the norm of their heads before it."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _library  # noqa: F401  (registers the operators)
from ._autograd import in_autocast, needs_grad

_rope = torch.ops.sail_ops.rope.default
_qk_norm_rope = torch.ops.sail_ops.qk_norm_rope.default
_qk_norm_rope_backward = torch.ops.sail_ops.qk_norm_rope_backward.default


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y = x * cos + rotate_half(x) * sin, rotate_half(x) = (-x_high, x_low), for the heads of q and k; rounded once.

    q: [..., H, A], k: [..., G, A], such as [B, S, H, A] or packed [T, H, A], fp32, bf16 or fp16; a last dimension of
    stride 1, so that views of one fused projection, or a transposed [B, H, S, A], cost no copy.
    cos, sin: [..., A], or [..., A/2] where both halves are equal, fp32, bf16 or fp16: a row for each token, repeated
    over dimensions of size 1 and missing leading ones, as transformers makes them ([1, S, A]). Without gradient.
    positions: int32 or int64, a token's row of cos and sin, which are then [P, A] or [P, A/2].
    Returns contiguous tensors like q and k. Saved for backward: the tables.
    On CUDA: A up to 512, fewer than 2^31 tokens, and at most three dimensions of tokens, once those that one stride
    walks in every tensor are joined; positions are looked at under SAIL_OPS_CHECK=1, which waits for the device.
    Raises ValueError for other shapes, dtypes or strides, an odd A, and (on the CPU) positions out of range.
    Source: Su et al. 2021, "RoFormer", in the order of halves that GPT-NeoX introduced.
    """
    if needs_grad("rope", q, k, constants=(cos, sin)):
        return _Rope.apply(q, k, cos, sin, positions)
    return _rope(q, k, cos, sin, positions, False)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight_A: Tensor,
    k_weight_A: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`rope` of rms_norm(x) = x / sqrt(mean(x^2) + eps) * weight over each head, for q and k in one pass.

    q, k, cos, sin, positions as for `rope`. q_weight_A, k_weight_A: [A], in q's dtype; under autocast they are cast to
    it. Between norm and rotation nothing is rounded.
    Saved for backward: q, k, the weights and the tables. The weights' gradients are the same for any number of threads.
    On CUDA: as `rope`.
    Raises ValueError as `rope`.
    Source: Qwen3 technical report (arXiv 2505.09388), section 2.
    """
    if in_autocast(q):
        q_weight_A, k_weight_A = q_weight_A.to(q.dtype), k_weight_A.to(q.dtype)
    if needs_grad("qk_norm_rope", q, k, q_weight_A, k_weight_A, constants=(cos, sin)):
        return _QkNormRope.apply(q, k, q_weight_A, k_weight_A, cos, sin, eps, positions)
    return _qk_norm_rope(q, k, q_weight_A, k_weight_A, cos, sin, positions, eps)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin, positions)
        return _rope(q, k, cos, sin, positions, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        need_q, need_k = ctx.needs_input_grad[:2]
        dq, dk = _rope(_with_rows(grad_q), _with_rows(grad_k), *ctx.saved_tensors, True)
        return dq if need_q else None, dk if need_k else None, None, None, None


class _QkNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        q_weight_A: Tensor,
        k_weight_A: Tensor,
        cos: Tensor,
        sin: Tensor,
        eps: float,
        positions: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, q_weight_A, k_weight_A, cos, sin, positions)
        ctx.eps = eps
        return _qk_norm_rope(q, k, q_weight_A, k_weight_A, cos, sin, positions, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:4]
        need_weights = needed[2] or needed[3]
        grads = _qk_norm_rope_backward(
            _with_rows(grad_q), _with_rows(grad_k), *ctx.saved_tensors, ctx.eps, need_weights
        )
        return *(g if need else None for g, need in zip(grads, needed, strict=True)), None, None, None, None


def _with_rows(grad: Tensor) -> Tensor:
    """Attention's gradients may be transposed, which costs nothing, or expanded scalars."""
    return grad if grad.stride(-1) == 1 else grad.contiguous()


@torch.library.register_fake("sail_ops::rope")
def _(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, transpose: bool
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.register_fake("sail_ops::qk_norm_rope")
def _(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.register_fake("sail_ops::qk_norm_rope_backward")
def _(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    eps: float,
    need_dweights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq_weight, dk_weight = (w.new_empty(w.shape if need_dweights else 0) for w in (q_weight, k_weight))
    return q.new_empty(q.shape), k.new_empty(k.shape), dq_weight, dk_weight
