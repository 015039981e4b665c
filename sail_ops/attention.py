"""Flash attention, on padded batches and on packs of sequences."""

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _flash_attn, _library  # noqa: F401  (the latter registers the operators)
from ._autograd import in_autocast, needs_grad

_attention = torch.ops.sail_ops.attention.default
_attention_backward = torch.ops.sail_ops.attention_backward.default
_attention_varlen = torch.ops.sail_ops.attention_varlen.default
_attention_varlen_backward = torch.ops.sail_ops.attention_varlen_backward.default


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """out = softmax(softmax_scale * q k^T) v by head, never holding the scores; summed in fp32, rounded once.

    q: [B, S, H, A], k and v: [B, L, G, A], fp32, bf16 or fp16, H a multiple of G: heads h * G // H share keys. A up to
    256. Only the last dimension must be contiguous: views of a fused projection and [B, H, S, A].transpose(1, 2) cost
    no copy. Under autocast all three are cast to its dtype.
    causal: query i sees the keys up to i + L - S, so that the last query sees all. A query that sees none gives 0.
    softmax_scale: A^-0.5 unless given.
    return_lse: also the log of each softmax's denominator, [B, H, S] fp32, -inf where no key is seen; differentiable.
    Returns a contiguous tensor like q. Saved for backward: q, k, v, out and lse. The gradients are the same for any
    number of threads.
    SAIL_OPS_ATTENTION=flash_attn in the environment sends bf16 and fp16 on CUDA to the flash-attn package, if it is
    installed; checks and error messages are then its own, and a gradient that reaches lse raises RuntimeError.
    On CUDA: bf16 and fp16 alone, A a multiple of 8 up to 128, fewer than 2^30 tokens in q and in k, and every row
    starts on 16 bytes: the address, and all strides but the last, in bytes, are multiples of 16.
    Raises ValueError for other shapes, dtypes or strides.
    Source: Dao 2023, "FlashAttention-2"; names and alignment as in its `flash_attn_func`.
    """
    q, k, v, scale = _prepare(q, k, v, softmax_scale)
    if _flash_attn.takes(q):
        return _flash_attn.attention(q, k, v, scale, causal, return_lse)
    args = q, k, v, scale, causal
    out, lse = _Attention.apply(*args) if needs_grad("attention", q, k, v) else _attention(*args)
    return (out, lse) if return_lse else out


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` within each sequence of a pack: tokens cu_seqlens[i] .. cu_seqlens[i + 1] are sequence i.

    q: [T, H, A], k and v: [U, G, A], else as for `attention`. lse: [H, T].
    cu_seqlens_q, cu_seqlens_k: [sequences + 1] int32, rising from 0 to T and U; a sequence may be empty.
    max_seqlen_q, max_seqlen_k: no sequence is longer.
    On CUDA: as `attention`; the values of cu_seqlens are looked at under SAIL_OPS_CHECK=1, which waits for the device.
    Raises ValueError for other shapes, dtypes or strides, and (on the CPU) for other values.
    Source: flash-attn's `flash_attn_varlen_func`.
    """
    q, k, v, scale = _prepare(q, k, v, softmax_scale)
    args = q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal
    if _flash_attn.takes(q):
        return _flash_attn.attention_varlen(*args, return_lse)
    out, lse = _AttentionVarlen.apply(*args) if needs_grad("attention_varlen", q, k, v) else _attention_varlen(*args)
    return (out, lse) if return_lse else out


def _prepare(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None) -> tuple[Tensor, Tensor, Tensor, float]:
    if in_autocast(q):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    # a head dim of 0 is the operator's to refuse
    return q, k, v, max(q.shape[-1], 1) ** -0.5 if softmax_scale is None else softmax_scale


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse = _attention(q, k, v, scale, causal)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.causal = scale, causal
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dout, dlse = _contiguous(dout, dlse, out)
        gradients = _attention_backward(dout, dlse, q, k, v, out, lse, ctx.scale, ctx.causal)
        return *_wanted(ctx, gradients), None, None


class _AttentionVarlen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        out, lse = _attention_varlen(q, k, v, cu_q, cu_k, *rest)
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k)
        ctx.rest = rest
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, cu_q, cu_k = ctx.saved_tensors
        dout, dlse = _contiguous(dout, dlse, out)
        gradients = _attention_varlen_backward(dout, dlse, q, k, v, out, lse, cu_q, cu_k, *ctx.rest)
        return *_wanted(ctx, gradients), None, None, None, None, None, None


def _contiguous(dout: Tensor | None, dlse: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor | None]:
    """Either output may be unused."""
    return (
        torch.zeros_like(out) if dout is None else dout.contiguous(),
        None if dlse is None else dlse.contiguous(),
    )


def _wanted(ctx: Any, gradients: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    return tuple(g if need else None for g, need in zip(gradients, ctx.needs_input_grad[:3], strict=True))


@torch.library.register_fake("sail_ops::attention")
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    B, S, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, S, dtype=torch.float32)


@torch.library.register_fake("sail_ops::attention_varlen")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(H, T, dtype=torch.float32)


@torch.library.register_fake("sail_ops::attention_backward")
def _(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.register_fake("sail_ops::attention_varlen_backward")
def _(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
