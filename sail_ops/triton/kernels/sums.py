"""Sums over the rows of partial results, in an order that depends on their number alone."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("rows",))
def column_sums_kernel(partial, out, rows, N, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr):
    """out[n] = sum over r of partial[r, n], in partial's dtype"""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], partial.dtype.element_ty)
    for r0 in range(0, rows, BLOCK_R):
        row = (r0 + tl.arange(0, BLOCK_R)).to(tl.int64)
        at = row[:, None] * N + n[None, :]
        acc += tl.sum(tl.load(partial + at, mask=(row < rows)[:, None] & (n < N)[None, :], other=0), 0)
    tl.store(out + n, acc.to(out.dtype.element_ty), mask=n < N)
