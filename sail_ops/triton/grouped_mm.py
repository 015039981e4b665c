"""Bare grouped GEMM with Triton: y[r] = x[r] @ w[e]. A weight [E, k, n] may be contiguous along n or, as the transposed
view of an [E, n, k] parameter, along k; neither is copied."""

from typing import NamedTuple

from torch import Tensor

from . import configs
from .checks import Check
from .gemm import grouped_gemm, weight_gradient
from .launch import capability, on_device
from .rows import Rows, check_offsets, tiles_of


class _Problem(NamedTuple):
    rows: Rows
    tiles: configs.Tiles
    along_n: bool  # w's last stride belongs to n


def _check(c: Check, x: Tensor, w: Tensor, offsets: Tensor) -> _Problem:
    c.rank("x", x, 2)
    c.rank("w", w, 3)
    c.real("x", x)
    c.dtype("w", w, x.dtype)
    c.same_device("w", w, x)
    (R, k), (E, _, n) = x.shape, w.shape
    c.that(w.shape[1] == k, "w", f"shape {list(w.shape)}", f"[E, {k}, n], x has k = {k}")
    c.positive("x", "k", k)
    c.positive("w", "n", n)
    c.positive("w", "E", E)
    c.that(x.stride(1) == 1 or k == 1, "x", f"rows of stride {x.stride(1)}", "rows of stride 1")
    along_n = (w.stride(2) == 1 or n == 1) and w.stride(1) >= n
    along_k = (w.stride(1) == 1 or k == 1) and w.stride(2) >= k
    c.that(along_n or along_k, "w", f"strides {w.stride(1)}, {w.stride(2)}", "stride 1 along k or along n")
    rows = Rows(R, 1, None, None, None, check_offsets(c, offsets, x, E))
    return _Problem(rows, configs.rows_tiles(capability(x.device), x.dtype, R, E), along_n)


@on_device
def grouped_mm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    p = _check(Check("grouped_mm"), x, w, offsets)
    y = x.new_empty(x.shape[0], w.shape[2])
    grouped_gemm(x, w, y, p.rows, tiles_of(p.rows, p.tiles.BM, tail=True), p.tiles, zero_tail=True)
    return y


@on_device
def grouped_mm_backward(
    dy: Tensor, x: Tensor, w: Tensor, offsets: Tensor, need_x: bool, need_w: bool
) -> tuple[Tensor, Tensor]:
    c = Check("grouped_mm_backward")
    p = _check(c, x, w, offsets)
    E, k, n = w.shape
    c.dtype("dy", dy, x.dtype)
    c.shape("dy", dy, x.shape[0], n)
    c.contiguous("dy", dy)
    c.same_device("dy", dy, x)
    dx, dw = x.new_empty(0), x.new_empty(0)
    if need_x:
        dx = x.new_empty(x.shape)
        row_tiles = tiles_of(p.rows, p.tiles.BM, tail=True)
        grouped_gemm(dy, w.transpose(1, 2), dx, p.rows, row_tiles, p.tiles, zero_tail=True)
    if need_w and p.along_n:
        dw = x.new_empty(E, k, n)
        weight_gradient(x, dy, dw, p.rows)
    elif need_w:  # laid out as w is: the gradient of an [E, n, k] parameter is contiguous
        dw = x.new_empty(E, n, k)
        weight_gradient(dy, x, dw, p.rows)
        dw = dw.transpose(1, 2)
    return dx, dw
