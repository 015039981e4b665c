"""Grouped GEMM over the row tiles of kernels/rows.py, and the gradient of its weights.

One program computes one tile of the output. Row tiles come in groups that walk over the columns together, so that a
group reads a weight's columns from L2 after the first of its tiles has fetched them. Sums are fp32, in an order that
depends on the shapes alone. Pointers are a 64-bit one to the tile and 32-bit offsets within it, which halves the
registers of an epilogue.
"""

import triton
import triton.language as tl

# Differ from step to step with the number of tokens: to compile for 1 or for multiples of 16 would only compile more
VARYING = ("tiles", "R", "parts")


@triton.jit
def tile_of(pid, tiles, columns, GROUP: tl.constexpr):
    """Row tile and column tile of a program."""
    width = GROUP * columns
    first = pid // width * GROUP
    rows = tl.minimum(tiles - first, GROUP)
    return first + pid % width % rows, pid % width // rows


@triton.jit
def multiply(acc, a, b, b_step, columns_ok, depth, BK: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr):
    """acc + A . B; a [BM, BK] and b [BK, BN] point at the first block, `depth` long; BK divides it if EVEN_K."""
    k = tl.arange(0, BK)
    for k0 in range(0, depth, BK):
        if EVEN_K:
            a_tile = tl.load(a)
            b_tile = tl.load(b, mask=columns_ok[None, :], other=0.0)
        else:
            k_ok = k < depth - k0
            a_tile = tl.load(a, mask=k_ok[None, :], other=0.0)
            b_tile = tl.load(b, mask=k_ok[:, None] & columns_ok[None, :], other=0.0)
        acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)
        a += BK
        b += BK * b_step
    return acc


@triton.jit(do_not_specialize=VARYING)
def gemm_kernel(
    a,
    a_stride,
    b,
    b_second,
    b_expert,
    b_k,
    b_n,
    bias,
    weights,
    out,
    offsets,
    tile_expert,
    tile_row,
    tiles,
    R,
    K,
    N,
    E,
    ZERO_TAIL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[r] = (a[r, :K] . b[e] + bias[e]) * weights[r], plus a[r, K:2K] . b_second[e] where that is given

    a [R, *], row stride a_stride; b[e] [K, N], strides b_k and b_n; out [R, N]. ZERO_TAIL: rows of no expert give 0.
    """
    tile, column = tile_of(tl.program_id(0), tiles, tl.cdiv(N, BN), GROUP)
    e = tl.load(tile_expert + tile).to(tl.int64)
    first = tl.load(tile_row + tile).to(tl.int64)
    m = tl.arange(0, BM)
    n = tl.arange(0, BN)
    k = tl.arange(0, BK)
    n_first = column.to(tl.int64) * BN
    n_ok = n < N - n_first
    out += first * N + n_first
    at = m[:, None] * N + n[None, :]
    if e == E:
        if ZERO_TAIL:
            nothing = tl.zeros([BM, BN], out.dtype.element_ty)
            tl.store(out + at, nothing, mask=(m < R - first)[:, None] & n_ok[None, :])
        return
    row_ok = m < tl.load(offsets + e + 1) - first
    a += first * a_stride
    a_tile = a + tl.where(row_ok, m, 0)[:, None] * a_stride + k[None, :]
    b_at = e * b_expert + n_first * b_n
    b_tile = k[:, None] * b_k + n[None, :] * b_n
    acc = tl.zeros([BM, BN], tl.float32)
    acc = multiply(acc, a_tile, b + b_at + b_tile, b_k, n_ok, K, BK, EVEN_K, PRECISION)
    if b_second is not None:
        acc = multiply(acc, a_tile + K, b_second + b_at + b_tile, b_k, n_ok, K, BK, EVEN_K, PRECISION)
    if bias is not None:
        acc += tl.load(bias + e * N + n_first + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    if weights is not None:
        acc *= tl.load(weights + first + m, mask=row_ok, other=0.0).to(tl.float32)[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=row_ok[:, None] & n_ok[None, :])


@triton.jit
def weight_gradient_kernel(
    a,
    a_stride,
    a_order,
    b,
    b_stride,
    b_order,
    top_k,
    out,
    out_expert,
    offsets,
    M,
    N,
    ACCUMULATE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[e, m, n] (+)= sum over the expert's rows r of a[r, m] * b[r, n]

    a_order, b_order: row r of the operand is row order[r] // top_k of the tensor. An expert without rows gives zeros.
    """
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    pid = tl.program_id(0)
    e = (pid // (tiles_m * tiles_n)).to(tl.int64)
    tile_m, tile_n = tile_of(pid % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP)
    m_first = tile_m.to(tl.int64) * BM
    n_first = tile_n.to(tl.int64) * BN
    m = tl.arange(0, BM)
    n = tl.arange(0, BN)
    m_ok = m < M - m_first
    n_ok = n < N - n_first
    a += m_first
    b += n_first
    end = tl.load(offsets + e + 1)
    acc = tl.zeros([BM, BN], tl.float32)
    for r0 in range(tl.load(offsets + e), end, BK):
        row = r0 + tl.arange(0, BK)
        ok = row < end
        a_row = row.to(tl.int64)
        b_row = a_row
        if a_order is not None:
            a_row = tl.load(a_order + row, mask=ok, other=0) // top_k
        if b_order is not None:
            b_row = tl.load(b_order + row, mask=ok, other=0) // top_k
        a_tile = tl.load(a + a_row[:, None] * a_stride + m[None, :], mask=ok[:, None] & m_ok[None, :], other=0.0)
        b_tile = tl.load(b + b_row[:, None] * b_stride + n[None, :], mask=ok[:, None] & n_ok[None, :], other=0.0)
        acc = tl.dot(tl.trans(a_tile), b_tile, acc, input_precision=PRECISION)
    out += e * out_expert + m_first * N + n_first
    at = m[:, None] * N + n[None, :]
    out_ok = m_ok[:, None] & n_ok[None, :]
    if ACCUMULATE:
        acc += tl.load(out + at, mask=out_ok, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=out_ok)
