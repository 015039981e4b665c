"""The expert layer's own kernels: the up-projection with its activation, both their gradients, and what is summed.

T tokens, D hidden, F expert width, E experts, R rows by expert (kernels/rows.py). h [R, 2F] is the pre-activation, gate
first. Row r belongs to token order[r] // top_k; without `order` rows are their own tokens.
"""

import triton
import triton.language as tl

from .gemm import VARYING, multiply, tile_of
from .math import activate, clamp_gate, clamp_up


@triton.jit
def token_of(order, row, row_ok, top_k):
    """The token of every row; of rows past the end any that there is."""
    if order is not None:
        return tl.load(order + row, mask=row_ok, other=0) // top_k
    else:
        return tl.where(row_ok, row, 0)


@triton.jit
def weight_of(weights, order, row, row_ok):
    """The routing weight of every row."""
    if order is not None:
        row = tl.load(order + row, mask=row_ok, other=0)
    return tl.load(weights + row, mask=row_ok, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=VARYING)
def up_kernel(
    x,
    x_stride,
    order,
    top_k,
    gate,
    up,
    weight_expert,
    bias,
    h,
    a,
    offsets,
    tile_expert,
    tile_row,
    tiles,
    D,
    F,
    E,
    clamp,
    ACTIVATION: tl.constexpr,
    CLAMPED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h = x . [gate, up]^T + bias and a = act(gate half) * (up half); either output may be None.

    The same columns of gate and up in one program, so that the activation needs nothing from another one.
    """
    tile, column = tile_of(tl.program_id(0), tiles, tl.cdiv(F, BN), GROUP)
    e = tl.load(tile_expert + tile).to(tl.int64)
    if e == E:
        return
    first = tl.load(tile_row + tile).to(tl.int64)
    m = tl.arange(0, BM)
    n = tl.arange(0, BN)
    k = tl.arange(0, BK)
    row_ok = m < tl.load(offsets + e + 1) - first
    n_first = column.to(tl.int64) * BN
    n_ok = n < F - n_first
    x += token_of(order, first + m, row_ok, top_k)[:, None] * x_stride + k[None, :]
    weight_at = e * weight_expert + n_first * D
    weight_tile = n[None, :] * D + k[:, None]
    gate = gate + weight_at + weight_tile
    up = up + weight_at + weight_tile
    acc_gate = tl.zeros([BM, BN], tl.float32)
    acc_up = tl.zeros([BM, BN], tl.float32)
    for k0 in range(0, D, BK):
        if EVEN_K:
            x_tile = tl.load(x)
            gate_tile = tl.load(gate, mask=n_ok[None, :], other=0.0)
            up_tile = tl.load(up, mask=n_ok[None, :], other=0.0)
        else:
            k_ok = k < D - k0
            x_tile = tl.load(x, mask=k_ok[None, :], other=0.0)
            gate_tile = tl.load(gate, mask=k_ok[:, None] & n_ok[None, :], other=0.0)
            up_tile = tl.load(up, mask=k_ok[:, None] & n_ok[None, :], other=0.0)
        acc_gate = tl.dot(x_tile, gate_tile, acc_gate, input_precision=PRECISION)
        acc_up = tl.dot(x_tile, up_tile, acc_up, input_precision=PRECISION)
        x += BK
        gate += BK
        up += BK
    if bias is not None:
        bias += e * 2 * F + n_first
        acc_gate += tl.load(bias + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
        acc_up += tl.load(bias + F + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    ok = row_ok[:, None] & n_ok[None, :]
    if h is not None:
        h += first * (2 * F) + n_first
        at = m[:, None] * (2 * F) + n[None, :]
        tl.store(h + at, acc_gate.to(h.dtype.element_ty), mask=ok)
        tl.store(h + F + at, acc_up.to(h.dtype.element_ty), mask=ok)
    if a is not None:
        if CLAMPED:
            acc_gate = clamp_gate(acc_gate, clamp)
            acc_up = clamp_up(acc_up, clamp)
        value, _ = activate(acc_gate, ACTIVATION, x.dtype.element_ty == tl.float32)
        value *= acc_up
        a += first * F + n_first
        tl.store(a + m[:, None] * F + n[None, :], value.to(a.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=VARYING)
def activation_gradient_kernel(
    dy,
    order,
    top_k,
    down,
    weights,
    h,
    dh,
    a_weighted,
    dots,
    offsets,
    tile_expert,
    tile_row,
    tiles,
    R,
    D,
    F,
    E,
    clamp,
    ACTIVATION: tl.constexpr,
    CLAMPED: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dA = dY . down, and from it and h: dH, weight * A, and <dA, A>, the routing weight's gradient.

    IN_PLACE: dh [R, 2F] is h itself; each element is read and written by one program. dots [columns / BN, R]: a part
    from every column tile, added up by weight_dots_kernel. Any of the three outputs may be None.
    """
    tile, column = tile_of(tl.program_id(0), tiles, tl.cdiv(F, BN), GROUP)
    e = tl.load(tile_expert + tile).to(tl.int64)
    if e == E:
        return
    first = tl.load(tile_row + tile).to(tl.int64)
    m = tl.arange(0, BM)
    n = tl.arange(0, BN)
    k = tl.arange(0, BK)
    row_ok = m < tl.load(offsets + e + 1) - first
    n_first = column.to(tl.int64) * BN
    n_ok = n < F - n_first
    dy += token_of(order, first + m, row_ok, top_k)[:, None] * D + k[None, :]
    down += e * D * F + n_first
    da = tl.zeros([BM, BN], tl.float32)
    da = multiply(da, dy, down + k[:, None] * F + n[None, :], F, n_ok, D, BK, EVEN_K, PRECISION)

    ok = row_ok[:, None] & n_ok[None, :]
    h += first * (2 * F) + n_first
    at = m[:, None] * (2 * F) + n[None, :]
    gate = tl.load(h + at, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(h + F + at, mask=ok, other=0.0).to(tl.float32)
    if IN_PLACE:
        tl.debug_barrier()  # no thread may write before all have read
    if CLAMPED:
        gate_cut = gate > clamp
        up_cut = (up > clamp) | (up < -clamp)
        gate = clamp_gate(gate, clamp)
        up = clamp_up(up, clamp)
    act, slope = activate(gate, ACTIVATION, h.dtype.element_ty == tl.float32)
    weight = tl.full([BM], 1.0, tl.float32)
    if weights is not None:
        weight = weight_of(weights, order, first + m, row_ok)
    if dots is not None:
        dots += column.to(tl.int64) * R + first
        tl.store(dots + m, tl.sum(da * (act * up), 1), mask=row_ok)
    if a_weighted is not None:
        a_weighted += first * F + n_first
        value = act * up * weight[:, None]
        tl.store(a_weighted + m[:, None] * F + n[None, :], value.to(a_weighted.dtype.element_ty), mask=ok)
    if dh is not None:
        dh += first * (2 * F) + n_first
        da *= weight[:, None]
        dgate = da * up * slope
        dup = da * act
        if CLAMPED:
            dgate = tl.where(gate_cut, 0.0, dgate)
            dup = tl.where(up_cut, 0.0, dup)
        tl.store(dh + at, dgate.to(dh.dtype.element_ty), mask=ok)
        tl.store(dh + F + at, dup.to(dh.dtype.element_ty), mask=ok)


@triton.jit
def combine_kernel(
    rows, row_of, weights, out, offsets, D, E, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    """out[t] = sum over k of rows[row_of[t, k]] (times weights[t, k] if WEIGHTED), dropped slots left out"""
    t = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    kept = tl.load(offsets + E)
    acc = tl.zeros([BLOCK], tl.float32)
    for k in range(TOP_K):
        row = tl.load(row_of + t * TOP_K + k).to(tl.int64)
        value = tl.load(rows + row * D + n, mask=(n < D) & (row < kept), other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + t * TOP_K + k, mask=row < kept, other=0.0).to(tl.float32)
        acc += value
    tl.store(out + t * D + n, acc.to(out.dtype.element_ty), mask=n < D)


@triton.jit(do_not_specialize=VARYING)
def weight_dots_kernel(
    dots,
    parts,
    dy,
    down_bias,
    order,
    top_k,
    dweights,
    offsets,
    tile_expert,
    tile_row,
    R,
    D,
    E,
    BM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dweights[order[r]] = sum of the row's `parts` dots + <dY, down_bias>"""
    tile = tl.program_id(0)
    e = tl.load(tile_expert + tile).to(tl.int64)
    if e == E:
        return
    row = (tl.load(tile_row + tile) + tl.arange(0, BM)).to(tl.int64)
    row_ok = row < tl.load(offsets + e + 1)
    total = tl.zeros([BM], tl.float32)
    dots += row
    for _ in range(parts):
        total += tl.load(dots, mask=row_ok, other=0.0)
        dots += R
    if down_bias is not None:
        token = token_of(order, row, row_ok, top_k)
        for n0 in range(0, D, BLOCK):
            n = n0 + tl.arange(0, BLOCK)
            grad = tl.load(dy + token[:, None] * D + n[None, :], mask=row_ok[:, None] & (n < D)[None, :], other=0.0)
            bias = tl.load(down_bias + e * D + n, mask=n < D, other=0.0).to(tl.float32)
            total += tl.sum(grad.to(tl.float32) * bias[None, :], 1)
    flat = row
    if order is not None:
        flat = tl.load(order + row, mask=row_ok, other=0)
    tl.store(dweights + flat, total, mask=row_ok)


@triton.jit
def bias_gradient_kernel(
    rows, stride, order, top_k, weights, out, offsets, N, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr
):
    """out[e] = sum over the expert's rows of rows[r] (or, with `order`, of its token's row), times the row's weight"""
    columns = tl.cdiv(N, BLOCK)
    e = (tl.program_id(0) // columns).to(tl.int64)
    n = tl.program_id(0) % columns * BLOCK + tl.arange(0, BLOCK)
    end = tl.load(offsets + e + 1)
    acc = tl.zeros([BLOCK], tl.float32)
    for r0 in range(tl.load(offsets + e), end, BLOCK_R):
        row = (r0 + tl.arange(0, BLOCK_R)).to(tl.int64)
        ok = row < end
        at = token_of(order, row, ok, top_k)[:, None] * stride + n[None, :]
        value = tl.load(rows + at, mask=ok[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)
        if weights is not None:
            value *= weight_of(weights, order, row, ok)[:, None]
        acc += tl.sum(value, 0)
    tl.store(out + e * N + n, acc.to(out.dtype.element_ty), mask=n < N)
