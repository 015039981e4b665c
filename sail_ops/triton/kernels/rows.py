"""Routing metadata, on the device alone: nothing here is known to the host, so nothing waits for it.

T tokens, K top-k, E experts. Rows are the T * K (token, slot) pairs in a stable order by expert, dropped ones last.
A row tile is up to BM rows of one expert; the host knows only how many tiles there are at most.
"""

import triton
import triton.language as tl

VARYING = ("n", "steps", "tiles")  # see gemm.py


@triton.jit(do_not_specialize=VARYING)
def keys_kernel(ids, stride_t, stride_k, keys, n, top_k, E, BLOCK: tl.constexpr):
    """keys[t * K + k] = ids[t, k], E for an id outside [0, E)"""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids + i // top_k * stride_t + i % top_k * stride_k, mask=i < n, other=-1)
    tl.store(keys + i, tl.where((expert >= 0) & (expert < E), expert, E), mask=i < n)


@triton.jit(do_not_specialize=VARYING)
def offsets_kernel(keys, n, steps, offsets, E, BLOCK: tl.constexpr):
    """offsets[e] = how many of the n sorted keys are below e, e <= E; a binary search of `steps` steps"""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros([BLOCK], tl.int32)
    high = low + n
    for _ in range(steps):
        middle = low + (high - low) // 2
        open_ = low < high
        below = tl.load(keys + middle, mask=open_, other=0) < e
        low = tl.where(open_ & below, middle + 1, low)
        high = tl.where(open_ & ~below, middle, high)
    tl.store(offsets + e, low, mask=e <= E)


@triton.jit(do_not_specialize=VARYING)
def row_of_kernel(order, row_of, n, BLOCK: tl.constexpr):
    """row_of[order[r]] = r"""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    flat = tl.load(order + r, mask=r < n, other=0)
    tl.store(row_of + flat, r, mask=r < n)


@triton.jit(do_not_specialize=VARYING)
def tiles_kernel(
    offsets, tile_expert, tile_row, tiles, E, BM: tl.constexpr, BLOCK: tl.constexpr, EXPERTS: tl.constexpr
):
    """Expert and first row of every row tile; tiles past the last expert's get E and the rows that are nobody's.

    Every program scans all experts' numbers of tiles: E integers from the cache instead of one more launch.
    """
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.zeros([BLOCK], tl.int32)
    first = tl.zeros([BLOCK], tl.int32)  # first tile of that expert
    before = 0
    for e0 in range(0, E, EXPERTS):
        e = e0 + tl.arange(0, EXPERTS)
        start = tl.load(offsets + e, mask=e < E, other=0)
        end = tl.load(offsets + e + 1, mask=e < E, other=0)
        ends = before + tl.cumsum((end - start + BM - 1) // BM, 0)
        past = (ends[None, :] <= tile[:, None]) & (e < E)[None, :]
        expert += tl.sum(past.to(tl.int32), 1)
        first = tl.maximum(first, tl.max(tl.where(past, ends[None, :], 0), 1))
        before = tl.max(ends, 0)
    row = tl.load(offsets + expert, mask=tile < tiles, other=0) + (tile - first) * BM
    tl.store(tile_expert + tile, expert, mask=tile < tiles)
    tl.store(tile_row + tile, row, mask=tile < tiles)
