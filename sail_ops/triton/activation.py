"""SwiGLU with Triton."""

from torch import Tensor

from .checks import Check
from .kernels import activation as kernels
from .launch import blocks, launch, on_device, power_of_two

_COLUMNS = 1024  # 8 elements a thread of 4 warps: loads of 16 bytes in 16-bit dtypes


@on_device
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    c = Check("swiglu")
    g = c.rows("gate", gate)
    c.like("up", up, gate)
    u = c.rows("up", up)
    out = gate.new_empty(gate.shape)
    n, F = g.shape
    block = power_of_two(F, 16, _COLUMNS)
    launch(kernels.swiglu_kernel, (n, blocks(F, block)), g, g.stride(0), u, u.stride(0), out, F, BLOCK=block)
    return out


@on_device
def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    c = Check("swiglu_backward")
    g = c.rows("gate", gate)
    c.like("up", up, gate)
    c.like("grad", grad, gate)
    u, d = c.rows("up", up), c.rows("grad", grad)
    dgate, dup = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    n, F = g.shape
    block = power_of_two(F, 16, _COLUMNS)
    grid = (n, blocks(F, block))
    strides = (d, d.stride(0), g, g.stride(0), u, u.stride(0))
    launch(kernels.swiglu_backward_kernel, grid, *strides, dgate, dup, F, BLOCK=block)
    return dgate, dup
