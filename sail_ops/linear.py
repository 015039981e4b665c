"""The dense layer: torch's where torch is fast, our products where it is not (bf16 and fp16 on most CPUs)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _library
from ._autograd import in_autocast, needs_grad

_linear = torch.ops.sail_ops.linear.default
_linear_backward = torch.ops.sail_ops.linear_backward.default
_SLOW = (torch.bfloat16, torch.float16)  # of torch's products on a CPU, by its instruction set


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x @ weight^T + bias, summed in fp32 and rounded once; takes the place of `F.linear`.

    x: [..., K], weight: [N, K], bias: [N] or None, of one dtype (under autocast: cast to its dtype). Returns [..., N].
    On a CPU, fp16 runs on this library's kernels, and so does bf16 where the instruction set in use has no bf16
    products (anything but avx512_bf16): torch computes these several times slower. All else is `F.linear`: fp32, any
    other dtype, and other devices, whose vendors' libraries have no faster peer.
    Saved for backward: x and weight. Rows that are not contiguous are copied.
    Raises ValueError for other shapes or dtypes; where it is `F.linear`, that raises its own RuntimeError.
    """
    autocast = in_autocast(x)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    if x.device.type != "cpu" or dtype not in _SLOW or _library.torch_multiplies(dtype):
        return F.linear(x, weight, bias)  # which sees to autocast by itself, and keeps the weights that it has cast
    if autocast:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return own_linear(x, weight, bias)


def own_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """On our kernels, whatever the dtype and the instruction set."""
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"sail_ops.linear: weight: got shape {list(weight.shape)}, expected [N, K] with x's last dimension as K,"
            f" of {list(x.shape)}"
        )
    x_MK = _rows(x.reshape(x.shape[:-1].numel(), x.shape[-1]))
    args = x_MK, _rows(weight), None if bias is None else bias.contiguous()
    y_MN = _Linear.apply(*args) if needs_grad("linear", *args) else _linear(*args)
    return y_MN.reshape(*x.shape[:-1], weight.shape[0])


def _rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_MK, weight_NK)
        return _linear(x_MK, weight_NK, bias_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, ...]:
        x_MK, weight_NK = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        dx, dweight = _linear_backward(grad_MN.contiguous(), x_MK, weight_NK, need_x, need_weight)
        dbias = grad_MN.sum(0) if need_bias else None
        return dx if need_x else None, dweight if need_weight else None, dbias


@torch.library.register_fake("sail_ops::linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("sail_ops::linear_backward")
def _(dy: Tensor, x: Tensor, weight: Tensor, need_dx: bool, need_dweight: bool) -> tuple[Tensor, Tensor]:
    M, N, K = *dy.shape, x.shape[1]
    return x.new_empty(M if need_dx else 0, K), x.new_empty(N if need_dweight else 0, K)
