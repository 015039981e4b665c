"""RMSNorm with Triton: checks, block sizes, launches."""

import torch
from torch import Tensor

from .checks import Check
from .kernels import norm as kernels
from .launch import blocks, launch, on_device, power_of_two
from .sums import column_sums

_WIDEST = 8192  # columns a program holds: 32 fp32 a thread of 8 warps
_ROWS = 32  # of one program of the backward: partial sums cost 1/16 of the traffic of x in bf16


def _block(D: int) -> dict[str, int]:
    block = power_of_two(D, 16, _WIDEST)
    return {"BLOCK": block, "num_warps": power_of_two(block // 512, 1, 8)}


def _check_weight(c: Check, weight: Tensor, x: Tensor) -> None:
    c.same_device("weight_D", weight, x)
    c.dtype("weight_D", weight, x.dtype)
    c.shape("weight_D", weight, x.shape[-1])
    c.contiguous("weight_D", weight)


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, y: Tensor, total: Tensor | None, eps: float) -> None:
    rows, D = x.shape
    stride = 0 if residual is None else residual.stride(0)
    size = float(D)
    launch(
        kernels.rms_norm_kernel, (rows,), x, x.stride(0), residual, stride, weight, y, total, D, size, eps, **_block(D)
    )


@on_device
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    c = Check("rms_norm")
    rows = c.rows("x", x)
    _check_weight(c, weight, x)
    y = x.new_empty(x.shape)
    _forward(rows, None, weight, y, None, eps)
    return y


@on_device
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    c = Check("add_rms_norm")
    rows = c.rows("x", x)
    c.like("residual", residual, x)
    residual_rows = c.rows("residual", residual)
    _check_weight(c, weight, x)
    y, total = x.new_empty(x.shape), x.new_empty(x.shape)
    _forward(rows, residual_rows, weight, y, total, eps)
    return y, total


@on_device
def rms_norm_backward(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor, eps: float, need_dx: bool, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    c = Check("rms_norm_backward")
    rows = c.rows("x", x)
    c.like("grad", grad, x)
    grad_rows = c.rows("grad", grad)
    sum_rows = None
    if grad_sum is not None:
        c.like("grad_sum", grad_sum, x)
        sum_rows = c.rows("grad_sum", grad_sum)
    _check_weight(c, weight, x)
    n, D = rows.shape
    programs, options = blocks(n, _ROWS), _block(D)
    dx = x.new_empty(x.shape if need_dx else 0)
    dweight = x.new_empty(D if need_dweight else 0)
    partial = x.new_empty(programs, D, dtype=torch.float32) if need_dweight else None
    if need_dx or need_dweight:
        launch(
            kernels.rms_norm_backward_kernel,
            (programs, blocks(D, options["BLOCK"])),
            grad_rows,
            grad_rows.stride(0),
            sum_rows,
            0 if sum_rows is None else sum_rows.stride(0),
            rows,
            rows.stride(0),
            weight,
            dx if need_dx else None,
            partial,
            n,
            D,
            float(D),
            eps,
            ROWS=_ROWS,
            **options,
        )
    if partial is not None:
        column_sums(partial, dweight)
    return dx, dweight
