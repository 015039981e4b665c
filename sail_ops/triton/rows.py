"""Rows by expert, found on the device: the host knows only how many there are at most, and never waits."""

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import INT32_MAX, Check, check_values, name_of
from .kernels import rows as kernels
from .launch import blocks, launch, power_of_two

_BLOCK = 1024  # elements of one program of the element-wise kernels
_TILES = 128  # row tiles of one program


class Rows(NamedTuple):
    """Row r belongs to token order[r] // top_k, and to expert e where offsets[e] <= r < offsets[e + 1]."""

    total: int  # of all rows, those that no expert owns included
    top_k: int
    order: Tensor | None  # [total] int64: row -> t * K + k; None: rows come sorted, and are their own tokens
    row_of: Tensor | None  # [total] int32, its inverse
    weights: Tensor | None  # [total], by t * K + k
    offsets: Tensor  # [E + 1] int32


class RowTiles(NamedTuple):
    """Up to `total` row tiles of BM rows; those past the last expert's have expert E."""

    total: int
    expert: Tensor  # [total] int32
    row: Tensor  # [total] int32, the first one


def route(c: Check, ids: Tensor, weights: Tensor, x: Tensor, E: int) -> Rows:
    """A stable sort of the T * K ids by expert; ids outside [0, E) come last and own no row."""
    c.rank("ids", ids, 2)
    T, K = x.shape[0], ids.shape[1]
    c.shape("ids", ids, T, K)
    c.positive("ids", "K", K)
    c.shape("weights", weights, T, K)
    c.same_device("ids", ids, x)
    _check_weights_dtype(c, weights, x)
    n = T * K
    c.that(n <= INT32_MAX, "ids", f"{n} routed rows", "at most 2147483647, what an int32 indexes")
    c.integer("ids", ids)
    # a radix sort takes a pass for every byte of a key
    keys = torch.empty(n, dtype=torch.int16 if E <= 2**15 - 1 else torch.int32, device=x.device)
    launch(kernels.keys_kernel, (blocks(n, _BLOCK),), ids, *ids.stride(), keys, n, K, E, BLOCK=_BLOCK)
    keys, order = keys.sort(stable=True)
    offsets = torch.empty(E + 1, dtype=torch.int32, device=x.device)
    block = power_of_two(E + 1, 16, _BLOCK)
    steps = n.bit_length()
    launch(kernels.offsets_kernel, (blocks(E + 1, block),), keys, n, steps, offsets, E, BLOCK=block)
    row_of = torch.empty(n, dtype=torch.int32, device=x.device)
    launch(kernels.row_of_kernel, (blocks(n, _BLOCK),), order, row_of, n, BLOCK=_BLOCK)
    return Rows(n, K, order, row_of, weights.contiguous(), offsets)


def sorted_rows(c: Check, offsets: Tensor, weights: Tensor | None, x: Tensor, E: int) -> Rows:
    """Rows that come sorted, with cumulative ends; rows past the last end are the tail."""
    R = x.shape[0]
    offsets = check_offsets(c, offsets, x, E)
    if weights is not None:
        c.shape("weights", weights, R)
        _check_weights_dtype(c, weights, x)
        weights = weights.contiguous()
    return Rows(R, 1, None, None, weights, offsets)


def check_offsets(c: Check, offsets: Tensor, x: Tensor, E: int) -> Tensor:
    """int32 cumulative ends [E] as offsets [E + 1] that never fall and stay within x's rows, whatever they were."""
    R = x.shape[0]
    c.dtype("offsets", offsets, torch.int32)
    c.shape("offsets", offsets, E)
    c.same_device("offsets", offsets, x)
    c.that(R <= INT32_MAX, "x", f"{R} rows", "at most 2147483647, what an int32 indexes")
    if check_values():
        last = 0
        for e, end in enumerate(offsets.tolist()):
            wanted = f"ends that never fall and stay within {R} rows"
            c.that(last <= end <= R, "offsets", f"{end} at {e} after {last}", wanted)
            last = end
    ends = offsets.clamp(0, R).cummax(0).values
    return torch.nn.functional.pad(ends, (1, 0))


def tiles_of(rows: Rows, BM: int, tail: bool) -> RowTiles:
    """`tail`: also tiles for the rows that no expert owns."""
    E = rows.offsets.shape[0] - 1
    count = rows.total // BM + min(E + tail, rows.total)
    expert, row = torch.empty(2, count, dtype=torch.int32, device=rows.offsets.device)
    experts = power_of_two(E, 16, 128)
    grid = (blocks(count, _TILES),)
    launch(kernels.tiles_kernel, grid, rows.offsets, expert, row, count, E, BM=BM, BLOCK=_TILES, EXPERTS=experts)
    return RowTiles(count, expert, row)


def _check_weights_dtype(c: Check, weights: Tensor, x: Tensor) -> None:
    wanted = f"float32 or x's dtype, {name_of(x.dtype)}"
    c.that(weights.dtype in (torch.float32, x.dtype), "weights", name_of(weights.dtype), wanted)
    c.same_device("weights", weights, x)
