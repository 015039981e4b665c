"""Causal attention of the decoder: padded batches with an optional mask, and packed streams.

B batch, L queries, S keys, H query heads, G key/value heads, A head dim, T tokens of a packed stream.
Both go through PyTorch's scaled_dot_product_attention; grouped heads are never repeated in memory.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PackedLayout(NamedTuple):
    """Where the samples of a packed stream lie: built once a step, read by every layer.

    `gather_SL` lists, for each group of samples of similar length, the stream position of every token, right-padded
    to the longest sample of the group; `scatter_T` finds each stream position in the concatenated groups.
    """

    gather_SL: tuple[Tensor, ...]
    scatter_T: Tensor


def packed_positions(cu_seqlens: Tensor) -> Tensor:
    """Positions [T] that start at 0 in every sample of the stream."""
    lengths = cu_seqlens.diff()
    starts = cu_seqlens[:-1].repeat_interleave(lengths)
    return torch.arange(len(starts), device=starts.device) - starts


def packed_layout(cu_seqlens: Tensor) -> PackedLayout:
    """Group the samples of a stream by length, rounded up to a power of two: padding at most doubles a sample.

    Padding keys come after every real query of their sample, so causal attention never reads them and no mask is
    needed. A pad position repeats the sample's last token; its output is dropped, its gradient is zero.
    """
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    bucket_S = (lengths - 1).clamp(min=1).log2().floor().long()
    gathers, positions = [], []
    for bucket in bucket_S.unique().tolist():
        chosen = (bucket_S == bucket).nonzero().squeeze(1)
        length_S1 = lengths[chosen, None]
        step_1L = torch.arange(int(length_S1.max()), device=cu_seqlens.device)[None]
        gather_SL = starts[chosen, None] + step_1L.minimum(length_S1 - 1)
        gathers.append(gather_SL)
        positions.append(torch.where(step_1L < length_S1, gather_SL, -1).flatten())
    stream = torch.cat(positions)
    real = (stream >= 0).nonzero().squeeze(1)
    scatter_T = torch.empty_like(real)
    scatter_T[stream[real]] = real
    return PackedLayout(tuple(gathers), scatter_T)


def packed_attention(q_THA: Tensor, k_TGA: Tensor, v_TGA: Tensor, layout: PackedLayout) -> Tensor:
    """Causal attention within each sample of a packed stream: [T, H, A] in, [T, H, A] out."""
    outs = []
    for gather_SL in layout.gather_SL:
        rows = gather_SL.flatten()
        q, k, v = (t.index_select(0, rows).unflatten(0, gather_SL.shape).transpose(1, 2) for t in (q_THA, k_TGA, v_TGA))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs).index_select(0, layout.scatter_T)


def masked_attention(q_BHLA: Tensor, k_BGSA: Tensor, v_BGSA: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of a padded batch, [B, H, L, A] in and out; `mask` [B, 1, L, S] is True where a query may look.

    Without a mask it is causal when there is more than one query, and a single query sees every key.
    """
    causal = mask is None and q_BHLA.shape[2] > 1
    return F.scaled_dot_product_attention(q_BHLA, k_BGSA, v_BGSA, attn_mask=mask, is_causal=causal, enable_gqa=True)


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
