"""RMSNorm forward and backward: a row is read twice, the second time from a cache, so that any width works.

1/rms is computed again in backward, which reads x anyway. The weight's gradient is summed over blocks of ROWS rows
here and over the blocks by sums.py.
"""

import triton
import triton.language as tl


@triton.jit
def inverse_rms(squares, size, eps):
    """In fp64, like the row's other scalar: free next to the row, and where dx cancels, their rounding would show."""
    return 1.0 / tl.sqrt(tl.sum(squares.to(tl.float64), 0) / size + eps)


@triton.jit
def rms_norm_kernel(x, x_stride, residual, residual_stride, weight, y, total, D, size, eps, BLOCK: tl.constexpr):
    """y = v / sqrt(mean(v^2) + eps) * weight with v = x, or v = total = x + residual, rounded; size = D as fp32"""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    acc = tl.zeros([BLOCK], tl.float32)
    for n0 in range(0, D, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        v = tl.load(x + n, mask=n < D, other=0.0).to(tl.float32)
        if residual is not None:
            v += tl.load(residual + row * residual_stride + n, mask=n < D, other=0.0).to(tl.float32)
            v = v.to(total.dtype.element_ty).to(tl.float32)
            tl.store(total + row * D + n, v.to(total.dtype.element_ty), mask=n < D)
        acc += v * v
    scale = inverse_rms(acc, size, eps).to(tl.float32)
    for n0 in range(0, D, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        v = tl.load(x + n, mask=n < D, other=0.0).to(tl.float32)
        if residual is not None:
            v += tl.load(residual + row * residual_stride + n, mask=n < D, other=0.0).to(tl.float32)
            v = v.to(total.dtype.element_ty).to(tl.float32)
        w = tl.load(weight + n, mask=n < D, other=0.0).to(tl.float32)
        tl.store(y + row * D + n, (v * scale * w).to(y.dtype.element_ty), mask=n < D)


@triton.jit(do_not_specialize=("rows",))
def rms_norm_backward_kernel(
    grad,
    grad_stride,
    grad_sum,
    grad_sum_stride,
    x,
    x_stride,
    weight,
    dx,
    partial,
    rows,
    D,
    size,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx = r (w g - x r^2 mean(w g x)) + grad_sum; partial[block of rows] = sum of g x r; r = 1 / sqrt(mean(x^2) + eps)

    A program does BLOCK columns of ROWS rows. The sums over a row are its own work for rows of up to BLOCK columns; of
    wider ones every column block computes them again.
    """
    block = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = columns < D
    w_own = tl.load(weight + columns, mask=ok, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    for row in range(block * ROWS, tl.minimum(block * ROWS + ROWS, rows)):
        squares = tl.zeros([BLOCK], tl.float32)
        products = tl.zeros([BLOCK], tl.float32)
        for n0 in range(0, D, BLOCK):
            n = n0 + tl.arange(0, BLOCK)
            v = tl.load(x + row * x_stride + n, mask=n < D, other=0.0).to(tl.float32)
            g = tl.load(grad + row * grad_stride + n, mask=n < D, other=0.0).to(tl.float32)
            w = tl.load(weight + n, mask=n < D, other=0.0).to(tl.float32)
            squares += v * v
            products += w * g * v
        inverse = inverse_rms(squares, size, eps)
        mean = (inverse * inverse * tl.sum(products.to(tl.float64), 0) / size).to(tl.float32)
        r = inverse.to(tl.float32)
        v = tl.load(x + row * x_stride + columns, mask=ok, other=0.0).to(tl.float32)
        g = tl.load(grad + row * grad_stride + columns, mask=ok, other=0.0).to(tl.float32)
        dweight += g * (v * r)
        if dx is not None:
            d = (w_own * g - v * mean) * r
            if grad_sum is not None:
                d += tl.load(grad_sum + row * grad_sum_stride + columns, mask=ok, other=0.0).to(tl.float32)
            tl.store(dx + row * D + columns, d.to(dx.dtype.element_ty), mask=ok)
    if partial is not None:
        tl.store(partial + block * D + columns, dweight, mask=ok)
