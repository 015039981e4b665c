"""The dense layer: torch's where torch is fast, our products where it is not: fp16, bf16 on most CPUs, a few rows."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _library
from ._autograd import in_autocast, needs_grad
from ._backends import DTYPES

_linear = torch.ops.sail_ops.linear.default
_linear_backward = torch.ops.sail_ops.linear_backward.default
# rows and weights from which on torch's products, where they are fast at all, are as fast (linear-cpu-few-rows)
_FEW_ROWS, _LEAST_WEIGHT = 16, 2**16


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x @ weight^T + bias, summed in fp32 and rounded once; takes the place of `F.linear`.

    x: [..., K], weight: [N, K], bias: [N] or None, of one dtype (under autocast: cast to its dtype). Returns [..., N].
    On a CPU, our kernels compute fp16, bf16 where the instruction set in use has no bf16 products (anything but
    avx512_bf16), and in every dtype at most 16 rows, as in decoding, by a weight of at least 65,536 numbers: torch
    takes 1.2 to 5 times as long for these, and far longer for gradients in fp16. All else is `F.linear`: other dtypes,
    and other devices, whose vendors' libraries have no faster peer.
    Saved for backward: x and weight. Rows that are not contiguous are copied.
    Raises ValueError for other shapes or dtypes; where it is `F.linear`, that raises its own RuntimeError.
    """
    autocast = in_autocast(x)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    if x.device.type != "cpu" or dtype not in DTYPES or torch_is_faster(dtype, x, weight):
        return F.linear(x, weight, bias)  # which sees to autocast by itself, and keeps the weights that it has cast
    if autocast:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return own_linear(x, weight, bias, torch_gradients=_library.torch_multiplies(dtype))


def torch_is_faster(dtype: torch.dtype, x: Tensor, weight: Tensor) -> bool:
    """Of products of this dtype on this CPU (docs/decisions/linear.md)."""
    if not _library.torch_multiplies(dtype):
        return False
    if torch.compiler.is_exporting():  # an exported program is for any number of rows
        return True
    return x.shape[:-1].numel() > _FEW_ROWS or weight.numel() < _LEAST_WEIGHT


def own_linear(x: Tensor, weight: Tensor, bias: Tensor | None, torch_gradients: bool = False) -> Tensor:
    """On our kernels, whatever the dtype and the instruction set; its gradients by torch's products where asked."""
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"sail_ops.linear: weight: got shape {list(weight.shape)}, expected [N, K] with x's last dimension as K,"
            f" of {list(x.shape)}"
        )
    x_MK = _rows(x.reshape(x.shape[:-1].numel(), x.shape[-1]))
    args = x_MK, _rows(weight), None if bias is None else bias.contiguous()
    y_MN = _Linear.apply(*args, torch_gradients) if needs_grad("linear", *args) else _linear(*args)
    return y_MN.reshape(*x.shape[:-1], weight.shape[0])


def _rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, torch_gradients: bool) -> Tensor:
        ctx.save_for_backward(x_MK, weight_NK)
        ctx.torch_gradients = torch_gradients
        return _linear(x_MK, weight_NK, bias_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, ...]:
        x_MK, weight_NK = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        dbias = grad_MN.sum(0) if need_bias else None
        if ctx.torch_gradients:
            return grad_MN @ weight_NK if need_x else None, grad_MN.t() @ x_MK if need_weight else None, dbias, None
        dx, dweight = _linear_backward(grad_MN.contiguous(), x_MK, weight_NK, need_x, need_weight)
        return dx if need_x else None, dweight if need_weight else None, dbias, None


@torch.library.register_fake("sail_ops::linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("sail_ops::linear_backward")
def _(dy: Tensor, x: Tensor, weight: Tensor, need_dx: bool, need_dweight: bool) -> tuple[Tensor, Tensor]:
    M, N, K = *dy.shape, x.shape[1]
    return x.new_empty(M if need_dx else 0, K), x.new_empty(N if need_dweight else 0, K)
