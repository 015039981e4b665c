"""Causal attention of the decoder: packed streams and padded batches.

B batch, L queries, S keys, H query heads, G key/value heads, A head dim, T = B*L tokens.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import sail_ops


class Keys(NamedTuple):
    """What the sequences of a pack look at, one after the other, where it is not their own tokens alone."""

    rows: Tensor  # int64: key i is that of [rows[i], columns[i]] in [B, S]
    columns: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


class Pack(NamedTuple):
    """Where the sequences begin and end among the T tokens: built once a step, read by every layer.

    The last query of a sequence sees all of its keys, the one before it all but the last, and so on.
    """

    cu_seqlens: Tensor  # int32, from 0 to T
    max_seqlen: int
    keys: Keys | None = None

    def pairs(self) -> int:
        """(query, key) pairs where the query sees the key: of k keys, the last query sees k, the one before k - 1."""
        keys = (self.keys or self).cu_seqlens.diff().long()
        seeing = keys.minimum(self.cu_seqlens.diff())
        return int((seeing * keys - seeing * (seeing - 1) // 2).sum())


def pack_of(cu_seqlens: Tensor) -> Pack:
    """For [samples + 1] int32 or int64."""
    return Pack(cu_seqlens.int(), int(cu_seqlens.diff().max()))


def pack_with_keys(sequences: Iterable[tuple[int, int, Tensor]]) -> Pack:
    """Of (queries, row, columns of the keys) for each sequence, in the order of the tokens."""
    queries, rows, columns = zip(*sequences, strict=True)
    device = columns[0].device
    numbers = queries, rows, [len(seen) for seen in columns]
    queries_N, rows_N, keys_N = (torch.tensor(n, device=device) for n in numbers)
    return pack_of_columns(queries_N, rows_N, keys_N, torch.cat(columns))


def pack_of_columns(queries_N: Tensor, rows_N: Tensor, keys_N: Tensor, columns: Tensor) -> Pack:
    """As `pack_with_keys`, from N sequences' numbers of queries, rows and numbers of keys, and all keys' columns."""
    cu_q, cu_k = (F.pad(lengths.cumsum(0), (1, 0)).int() for lengths in (queries_N, keys_N))
    return Pack(cu_q, int(queries_N.max()), Keys(rows_N.repeat_interleave(keys_N), columns, cu_k, int(keys_N.max())))


def pack_of_padding(mask_BS: Tensor, length: int) -> Pack:
    """Of a batch whose keys are tokens where mask_BS is True, and whose queries are the last `length` of each row.

    A sequence for each run of tokens, and for each run of padding, which sees nothing and gives 0.
    """
    sequences = []
    for row, mask_S in enumerate(mask_BS):
        stop, tokens = mask_S.numel() - length, mask_S.nonzero().flatten()
        runs = torch.unique_consecutive(mask_S[stop:], return_counts=True)
        for is_token, count in zip(*(t.tolist() for t in runs), strict=True):
            stop += count
            sequences.append((count, row, tokens[tokens < stop] if is_token else tokens[:0]))
    return pack_with_keys(sequences)


def packed_positions(cu_seqlens: Tensor) -> Tensor:
    """Positions [T] that start at 0 in every sample of the stream."""
    lengths = cu_seqlens.diff()
    starts = cu_seqlens[:-1].repeat_interleave(lengths)
    return torch.arange(len(starts), device=starts.device) - starts


def causal_attention(
    q_BLHA: Tensor, k_BSGA: Tensor, v_BSGA: Tensor, *, mask: Tensor | None = None, pack: Pack | None = None
) -> Tensor:
    """[B, L, H, A]: within each sequence of a `pack`, or of queries from the first key on, or of one on all keys.

    mask: [B, 1, L, S], True where a query may look, for all else; PyTorch's scaled_dot_product_attention takes it.
    """
    if pack is not None:
        keys = pack.keys or pack
        if pack.keys is None:
            k_TGA, v_TGA = k_BSGA.flatten(0, 1), v_BSGA.flatten(0, 1)
        else:
            k_TGA, v_TGA = (gathered(t, pack.keys) for t in (k_BSGA, v_BSGA))
        lengths = pack.cu_seqlens, keys.cu_seqlens, pack.max_seqlen, keys.max_seqlen
        return sail_ops.attention_varlen(q_BLHA.flatten(0, 1), k_TGA, v_TGA, *lengths, causal=True).view_as(q_BLHA)
    if mask is None:
        length = q_BLHA.shape[1]
        if length > 1:  # a static cache has room behind the keys
            k_BSGA, v_BSGA = k_BSGA[:, :length], v_BSGA[:, :length]
        return sail_ops.attention(q_BLHA, k_BSGA, v_BSGA, causal=True)
    q, k, v = (t.transpose(1, 2) for t in (q_BLHA, k_BSGA, v_BSGA))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def gathered(t_BSGA: Tensor, keys: Keys) -> Tensor:
    """t at the keys, [keys, G, A]. Its backward adds up keys that several sequences see, in the same order each time.

    On a CPU that is index_select's: advanced indexing's adds from several threads at once, by atomics. On CUDA it is
    the other way round.
    """
    if t_BSGA.device.type == "cpu":
        return t_BSGA.flatten(0, 1).index_select(0, keys.rows * t_BSGA.shape[1] + keys.columns)
    return t_BSGA[keys.rows, keys.columns]


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
