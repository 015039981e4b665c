"""Causal attention of the decoder: packed streams and padded batches.

B batch, L queries, S keys, H query heads, G key/value heads, A head dim, T tokens of a packed stream.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import sail_ops


class Pack(NamedTuple):
    """Where the samples of a packed stream begin and end: built once a step, read by every layer."""

    cu_seqlens: Tensor  # int32, from 0 to T
    max_seqlen: int


def pack_of(cu_seqlens: Tensor) -> Pack:
    """For [samples + 1] int32 or int64."""
    return Pack(cu_seqlens.int(), int(cu_seqlens.diff().max()))


def packed_positions(cu_seqlens: Tensor) -> Tensor:
    """Positions [T] that start at 0 in every sample of the stream."""
    lengths = cu_seqlens.diff()
    starts = cu_seqlens[:-1].repeat_interleave(lengths)
    return torch.arange(len(starts), device=starts.device) - starts


def causal_attention(
    q_BLHA: Tensor, k_BSGA: Tensor, v_BSGA: Tensor, *, mask: Tensor | None = None, pack: Pack | None = None
) -> Tensor:
    """[B, L, H, A]: within each sample of a `pack` (B = 1), or of queries from the first key on, or of one on all keys.

    mask: [B, 1, L, S], True where a query may look, for all else; PyTorch's scaled_dot_product_attention takes it.
    """
    if pack is not None:
        lengths = pack.cu_seqlens, pack.cu_seqlens, pack.max_seqlen, pack.max_seqlen
        return sail_ops.attention_varlen(q_BLHA[0], k_BSGA[0], v_BSGA[0], *lengths, causal=True)[None]
    if mask is None:
        length = q_BLHA.shape[1]
        if length > 1:  # a static cache has room behind the keys
            k_BSGA, v_BSGA = k_BSGA[:, :length], v_BSGA[:, :length]
        return sail_ops.attention(q_BLHA, k_BSGA, v_BSGA, causal=True)
    q, k, v = (t.transpose(1, 2) for t in (q_BLHA, k_BSGA, v_BSGA))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def check_cu_seqlens(cu_seqlens: Tensor, batch: int, length: int) -> None:
    """Raise ValueError unless cu_seqlens rises from 0 to the length of a stream in a batch of one."""
    if batch != 1:
        raise ValueError(f"SailVL2: cu_seqlens needs a batch of one packed stream, got a batch of {batch}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"SailVL2: cu_seqlens must be int32 or int64 [samples + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != length or (cu_seqlens.diff() <= 0).any():
        raise ValueError(f"SailVL2: cu_seqlens must rise from 0 to {length}, got {cu_seqlens.tolist()}")
