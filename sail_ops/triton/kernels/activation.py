"""SwiGLU, element-wise on rows of F columns."""

import triton
import triton.language as tl

from .math import activate


@triton.jit
def swiglu_kernel(gate, gate_stride, up, up_stride, out, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + row * gate_stride + n, mask=n < F, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + n, mask=n < F, other=0.0).to(tl.float32)
    value, _ = activate(g, 0, True)
    tl.store(out + row * F + n, (value * u).to(out.dtype.element_ty), mask=n < F)


@triton.jit
def swiglu_backward_kernel(grad, grad_stride, gate, gate_stride, up, up_stride, dgate, dup, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d = tl.load(grad + row * grad_stride + n, mask=n < F, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + n, mask=n < F, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + n, mask=n < F, other=0.0).to(tl.float32)
    value, slope = activate(g, 0, True)
    tl.store(dgate + row * F + n, (d * u * slope).to(dgate.dtype.element_ty), mask=n < F)
    tl.store(dup + row * F + n, (d * value).to(dup.dtype.element_ty), mask=n < F)
