"""fused_experts and grouped_experts with Triton: checks, the layer as data, the forward.

T tokens, D hidden, F expert width, E experts, K top-k, R rows by expert (rows.py).
"""

import math
from typing import NamedTuple

from torch import Tensor

from . import configs
from .checks import Check
from .gemm import constants, grouped_gemm
from .kernels import moe as kernels
from .launch import blocks, capability, launch, on_device, power_of_two
from .rows import Rows, RowTiles, route, sorted_rows, tiles_of


class Layer(NamedTuple):
    """The layer's tensors, and its halves of gate and up: views of one tensor or a pair."""

    x: Tensor  # [T, D]
    gate: Tensor  # [E, F, D]
    up: Tensor  # [E, F, D], strides as gate
    down: Tensor  # [E, D, F]
    gate_up_bias: Tensor | None  # [E, 2F]
    down_bias: Tensor | None  # [E, D]
    activation: int
    clamp: float
    tiles: configs.Tiles  # of the products with a row for every routed row

    def even(self, depth: int) -> bool:
        return depth % self.tiles.BK == 0


def check_layer(
    c: Check,
    x: Tensor,
    gate_up: Tensor,
    up: Tensor | None,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: int,
    clamp: float | None,
    top_k: int,
) -> Layer:
    c.rank("x", x, 2)
    c.real("x", x)
    c.rank("down", down, 3)
    D, (E, _, F) = x.shape[1], down.shape
    c.positive("x", "D", D)
    c.positive("down", "E", E)
    c.positive("down", "F", F)
    c.shape("down", down, E, D, F)
    first = "gate_up" if up is None else "gate"
    c.shape(first, gate_up, E, 2 * F if up is None else F, D)
    if up is not None:
        c.shape("up", up, E, F, D)
    if gate_up_bias is not None:
        c.shape("gate_up_bias", gate_up_bias, E, 2 * F)
    if down_bias is not None:
        c.shape("down_bias", down_bias, E, D)
    weights = {"down": down, first: gate_up, "up": up, "gate_up_bias": gate_up_bias, "down_bias": down_bias}
    for name, t in weights.items():
        if t is not None:
            c.dtype(name, t, x.dtype)
            c.same_device(name, t, x)
            c.contiguous(name, t)
    c.that(x.stride(1) == 1 or D == 1, "x", f"rows of stride {x.stride(1)}", "rows of stride 1")
    c.that(clamp is None or clamp > 0, "clamp", str(clamp), "a positive number")
    c.that(activation in (0, 1, 2), "activation", str(activation), "0, 1 or 2")
    tiles = configs.rows_tiles(capability(x.device), x.dtype, x.shape[0] * top_k, E)
    halves = (gate_up[:, :F], gate_up[:, F:]) if up is None else (gate_up, up)
    bound = math.inf if clamp is None else clamp
    return Layer(x, *halves, down, gate_up_bias, down_bias, activation, bound, tiles)


def up_projection(layer: Layer, rows: Rows, row_tiles: RowTiles, h: Tensor | None, a: Tensor | None) -> None:
    """a = act(x . gate^T) * (x . up^T), keeping the pre-activation in h where it is wanted"""
    E, F, D = layer.gate.shape
    tiles = layer.tiles.gated()
    launch(
        kernels.up_kernel,
        (row_tiles.total * blocks(F, tiles.BN),),
        layer.x,
        layer.x.stride(0),
        rows.order,
        rows.top_k,
        layer.gate,
        layer.up,
        layer.gate.stride(0),
        layer.gate_up_bias,
        h,
        a,
        rows.offsets,
        row_tiles.expert,
        row_tiles.row,
        row_tiles.total,
        D,
        F,
        E,
        layer.clamp,
        ACTIVATION=layer.activation,
        CLAMPED=layer.clamp < math.inf,
        EVEN_K=layer.even(D),
        **constants(tiles),
    )


def combine(rows: Rows, per_row: Tensor, weighted: bool, out: Tensor) -> None:
    """out[t] = sum over the token's rows of per_row[r] (times its weight)"""
    T, D = out.shape
    block = power_of_two(D, 16, 1024)  # 4 warps of 8 elements a thread: one load of 16 bytes each
    E = rows.offsets.shape[0] - 1
    grid = (T, blocks(D, block))
    launch(
        kernels.combine_kernel,
        grid,
        per_row,
        rows.row_of,
        rows.weights,
        out,
        rows.offsets,
        D,
        E,
        TOP_K=rows.top_k,
        WEIGHTED=weighted,
        BLOCK=block,
    )


def _forward(layer: Layer, rows: Rows, save_h: bool) -> tuple[Tensor, Tensor]:
    x, F, D = layer.x, layer.down.shape[2], layer.down.shape[1]
    is_sorted = rows.order is None
    h = x.new_empty(rows.total if save_h else 0, 2 * F)
    a = x.new_empty(rows.total, F)
    row_tiles = tiles_of(rows, layer.tiles.BM, tail=is_sorted)
    up_projection(layer, rows, row_tiles, h if save_h else None, a)
    y_rows = x.new_empty(rows.total, D)
    grouped_gemm(
        a,
        layer.down.transpose(1, 2),
        y_rows,
        rows,
        row_tiles,
        layer.tiles,
        bias=layer.down_bias,
        weighted=is_sorted,
        zero_tail=is_sorted,
    )
    if is_sorted:
        return y_rows, h
    y = x.new_empty(x.shape)
    combine(rows, y_rows, True, y)
    return y, h


@on_device
def fused_experts(
    x: Tensor,
    gate_up: Tensor,
    up: Tensor | None,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: int,
    clamp: float | None,
    save_h: bool,
) -> tuple[Tensor, Tensor]:
    c = Check("fused_experts")
    top_k = ids.shape[-1] if ids.dim() else 1
    layer = check_layer(c, x, gate_up, up, down, gate_up_bias, down_bias, activation, clamp, top_k)
    return _forward(layer, route(c, ids, weights, x, down.shape[0]), save_h)


@on_device
def grouped_experts(
    x: Tensor,
    gate_up: Tensor,
    up: Tensor | None,
    down: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: int,
    clamp: float | None,
    save_h: bool,
) -> tuple[Tensor, Tensor]:
    c = Check("grouped_experts")
    layer = check_layer(c, x, gate_up, up, down, gate_up_bias, down_bias, activation, clamp, 1)
    return _forward(layer, sorted_rows(c, offsets, weights, x, down.shape[0]), save_h)
