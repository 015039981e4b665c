"""Backward of the expert layer with Triton, in two passes:
1  dA = dY . down, and from it and the pre-activation: dH, the weighted activation, the routing weights' gradient
2  dX = dH . gate_up,  dgate_up = dH^T . X,  ddown = dY^T . (weight * A), and the biases' column sums
Expert outputs are neither stored nor computed again. What nobody needs is neither allocated nor computed.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._autograd import Need
from .checks import Check, name_of
from .gemm import constants, grouped_gemm, weight_gradient
from .kernels import moe as kernels
from .launch import blocks, launch, on_device, power_of_two
from .moe import Layer, check_layer, combine, up_projection
from .rows import Rows, RowTiles, route, sorted_rows, tiles_of

Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

_DOT_COLUMNS = 128  # of dY and down_bias at a time
_BIAS_ROWS, _BIAS_COLUMNS = 32, 128  # of a program's step: 8 KB of 16-bit rows


class _Pass(NamedTuple):
    """What the first pass leaves for the second; None: nobody needs it."""

    layer: Layer
    rows: Rows
    row_tiles: RowTiles
    dy: Tensor  # [T, D]
    dh: Tensor | None  # [R, 2F]
    a_weighted: Tensor | None  # [R, F]


def _activations(layer: Layer, rows: Rows, dy: Tensor, h: Tensor, needs: int, dweights: Tensor | None) -> _Pass:
    x, R, (E, D, F) = layer.x, rows.total, layer.down.shape
    row_tiles = tiles_of(rows, layer.tiles.BM, tail=rows.order is None)
    tiles = layer.tiles.gated()
    columns = blocks(F, tiles.BN)
    again = not h.shape[0]
    if again:
        h = x.new_empty(R, 2 * F)
        up_projection(layer, rows, row_tiles, h, None)
    dh = (h if again else x.new_empty(R, 2 * F)) if needs & (Need.X | Need.GATE_UP | Need.GATE_UP_BIAS) else None
    a_weighted = x.new_empty(R, F) if needs & Need.DOWN else None
    dots = x.new_empty(columns, R, dtype=torch.float32) if dweights is not None else None
    launch(
        kernels.activation_gradient_kernel,
        (row_tiles.total * columns,),
        dy,
        rows.order,
        rows.top_k,
        layer.down,
        rows.weights,
        h,
        dh,
        a_weighted,
        dots,
        rows.offsets,
        row_tiles.expert,
        row_tiles.row,
        row_tiles.total,
        R,
        D,
        F,
        E,
        layer.clamp,
        ACTIVATION=layer.activation,
        CLAMPED=layer.clamp < math.inf,
        IN_PLACE=dh is h,
        EVEN_K=layer.even(D),
        **constants(tiles),
    )
    if dots is not None:
        grid = (row_tiles.total,)
        launch(
            kernels.weight_dots_kernel,
            grid,
            dots,
            columns,
            dy,
            layer.down_bias,
            rows.order,
            rows.top_k,
            dweights,
            rows.offsets,
            row_tiles.expert,
            row_tiles.row,
            R,
            D,
            E,
            BM=tiles.BM,
            BLOCK=_DOT_COLUMNS,
        )
    return _Pass(layer, rows, row_tiles, dy, dh, a_weighted)


def _dx(p: _Pass) -> Tensor:
    layer, rows, dh = p.layer, p.rows, p.dh
    assert dh is not None
    is_sorted = rows.order is None
    dx_rows = layer.x.new_empty(rows.total, layer.x.shape[1])
    grouped_gemm(dh, layer.gate, dx_rows, rows, p.row_tiles, layer.tiles, b_second=layer.up, zero_tail=is_sorted)
    if is_sorted:
        return dx_rows
    dx = layer.x.new_empty(layer.x.shape)
    combine(rows, dx_rows, False, dx)
    return dx


def _bias_gradient(p: _Pass, per_row: Tensor, out: Tensor, tokens: bool) -> None:
    """Column sums over each expert's rows; `tokens`: of its tokens' rows, times the routing weights"""
    E, N = out.shape
    rows = p.rows
    block = power_of_two(N, 16, _BIAS_COLUMNS)
    launch(
        kernels.bias_gradient_kernel,
        (E * blocks(N, block),),
        per_row,
        N,
        rows.order if tokens else None,
        rows.top_k,
        rows.weights if tokens else None,
        out,
        rows.offsets,
        N,
        BLOCK_R=_BIAS_ROWS,
        BLOCK=block,
    )


def _check_main(c: Check, weights: tuple[Tensor, Tensor | None], main: tuple[Tensor | None, Tensor | None]) -> None:
    """Gradient buffers of the caller's: of the weights' shapes, fp32 or the weights' dtype."""
    c.that((main[1] is None) == (weights[1] is None), "main_grads", "another number of buffers", "one buffer a weight")
    for weight, buffer in zip(weights, main, strict=True):
        if weight is None or buffer is None:
            continue
        wanted = f"float32 or the weight's dtype, {name_of(weight.dtype)}"
        c.that(buffer.dtype in (torch.float32, weight.dtype), "main_grads", name_of(buffer.dtype), wanted)
        given = f"shape {list(buffer.shape)}"
        c.that(buffer.shape == weight.shape, "main_grads", given, f"the weight's shape {list(weight.shape)}")
        c.contiguous("main_grads", buffer)
        c.same_device("main_grads", buffer, weight)
    if main[1] is not None and main[0] is not None:
        c.dtype("main_grads", main[1], main[0].dtype)


def _backward(
    c: Check,
    layer: Layer,
    rows: Rows,
    dy: Tensor,
    h: Tensor,
    gate_up: Tensor,
    up: Tensor | None,
    needs: int,
    main_gate_up: Tensor | None,
    main_up: Tensor | None,
    main_down: Tensor | None,
) -> Grads:
    x, F = layer.x, layer.down.shape[2]
    c.dtype("dy", dy, x.dtype)
    c.shape("dy", dy, *x.shape)
    c.contiguous("dy", dy)
    c.same_device("dy", dy, x)
    if h.shape[0]:
        c.shape("h", h, rows.total, 2 * F)
        c.contiguous("h", h)
        c.dtype("h", h, x.dtype)
    if needs & Need.GATE_UP and main_gate_up is not None:
        _check_main(c, (gate_up, up), (main_gate_up, main_up))
    if needs & Need.DOWN and main_down is not None:
        _check_main(c, (layer.down, None), (main_down, None))

    shape = (rows.total,) if rows.order is None else (x.shape[0], rows.top_k)
    # zeros: what dropped ids and tail rows get
    dweights = x.new_zeros(shape if needs & Need.WEIGHTS else 0, dtype=torch.float32)
    p = _activations(layer, rows, dy, h, needs, dweights if needs & Need.WEIGHTS else None)

    dx, dgate_up, dup, ddown, dgate_up_bias, ddown_bias = (x.new_empty(0) for _ in range(6))  # no two may be one
    if needs & Need.X:
        dx = _dx(p)
    accumulate = not needs & Need.OVERWRITE
    if needs & Need.GATE_UP:
        assert p.dh is not None
        own = main_gate_up is None
        first = torch.empty_like(gate_up) if main_gate_up is None else main_gate_up
        second = main_up if up is None or not own else torch.empty_like(up)
        halves = (first[:, :F], first[:, F:]) if second is None else (first, second)
        for half, out in enumerate(halves):
            dh = p.dh[:, half * F : (half + 1) * F]
            weight_gradient(dh, x, out, rows, gather_b=True, accumulate=accumulate and not own)
        if own:
            dgate_up, dup = first, dup if second is None else second
    if needs & Need.DOWN:
        assert p.a_weighted is not None
        out = torch.empty_like(layer.down) if main_down is None else main_down
        adding = accumulate and main_down is not None
        weight_gradient(dy, p.a_weighted, out, rows, gather_a=True, accumulate=adding)
        if main_down is None:
            ddown = out
    if needs & Need.GATE_UP_BIAS:
        assert p.dh is not None
        dgate_up_bias = x.new_empty(layer.down.shape[0], 2 * F)
        _bias_gradient(p, p.dh, dgate_up_bias, tokens=False)
    if needs & Need.DOWN_BIAS:
        ddown_bias = x.new_empty(layer.down.shape[:2])
        _bias_gradient(p, dy, ddown_bias, tokens=True)
    return dx, dgate_up, dup, ddown, dweights, dgate_up_bias, ddown_bias


@on_device
def fused_experts_backward(
    dy: Tensor,
    x: Tensor,
    gate_up: Tensor,
    up: Tensor | None,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    h: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: int,
    clamp: float | None,
    needs: int,
    main_gate_up: Tensor | None,
    main_up: Tensor | None,
    main_down: Tensor | None,
) -> Grads:
    c = Check("fused_experts_backward")
    top_k = ids.shape[-1] if ids.dim() else 1
    layer = check_layer(c, x, gate_up, up, down, gate_up_bias, down_bias, activation, clamp, top_k)
    rows = route(c, ids, weights, x, down.shape[0])
    return _backward(c, layer, rows, dy, h, gate_up, up, needs, main_gate_up, main_up, main_down)


@on_device
def grouped_experts_backward(
    dy: Tensor,
    x: Tensor,
    gate_up: Tensor,
    up: Tensor | None,
    down: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    h: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: int,
    clamp: float | None,
    needs: int,
    main_gate_up: Tensor | None,
    main_up: Tensor | None,
    main_down: Tensor | None,
) -> Grads:
    c = Check("grouped_experts_backward")
    layer = check_layer(c, x, gate_up, up, down, gate_up_bias, down_bias, activation, clamp, 1)
    rows = sorted_rows(c, offsets, weights, x, down.shape[0])
    if weights is None:
        needs &= ~Need.WEIGHTS
    return _backward(c, layer, rows, dy, h, gate_up, up, needs, main_gate_up, main_up, main_down)
