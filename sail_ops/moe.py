"""The expert layer of a mixture of experts: fused, on sorted rows, and as a bare grouped GEMM.

T tokens, D hidden, F expert width, E experts, K top-k, R rows sorted by expert; suffixes on tensors (`x_TD`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _library  # noqa: F401  (registers the operators)
from ._autograd import Need, in_autocast, needs_grad
from .types import Biases, GateUp, MainGrads

_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}

_ops = torch.ops.sail_ops


def fused_experts(
    x_TD: Tensor,
    gate_up_E2FD: GateUp,
    down_EDF: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    *,
    activation: str = "silu",
    biases: Biases | None = None,
    clamp: float | None = None,
    recompute: bool = False,
    main_grads: MainGrads | None = None,
    accumulate: bool = True,
) -> Tensor:
    """y_t = sum_k w_tk * down[e] @ (act(gate[e] @ x_t) * (up[e] @ x_t)), e = ids_tk.

    The whole expert layer: gather, up-projection with gated activation, down-projection, weighted combine. Products
    are summed in fp32; the activation, each expert's output and the result are rounded once to x's dtype.
    Deterministic; gradients for x, gate_up, down, weights and biases, each computed only if wanted.

    Args:
        x_TD: tokens; fp32, bf16 or fp16; rows contiguous.
        gate_up_E2FD: both projections, gate rows first (transformers' `gate_up_proj`), or the pair (gate_EFD, up_EFD).
        down_EDF: down-projection (transformers' `down_proj`).
        ids_TK: int32 or int64 expert ids. Ids outside [0, E) are dropped: nothing is read or added for them and their
            weight's gradient is zero (expert parallelism).
        weights_TK: routing weights, fp32 or x's dtype.
        activation: "silu", "gelu" or "gelu_tanh".
        biases: (gate_up_bias_E2F, down_bias_ED).
        clamp: c > 0: gate = min(gate, c) and up = min(max(up, -c), c) before the activation.
        recompute: save x alone for backward and compute the pre-activation again; otherwise x and the pre-activation,
            2D + 4FK bytes a token in 16-bit dtypes.
        main_grads: buffers (gate_up, down), or (gate, up, down) for a pair, that backward adds the weight gradients
            into, in fp32 or the weights' dtype; the weights' own `.grad` stays None. A pair's gate and up go together.
        accumulate: False: backward overwrites `main_grads`, which a step's first micro-batch then need not zero.

    Raises:
        ValueError: a wrong rank, size, dtype, device or stride; the message names the argument.

    On CUDA: the compiled kernels take bf16 and fp16 alone, and at most 12,032 experts; Triton's take fp32 too.

    Source: the algorithm of SonicMoE (arXiv 2512.14080): the routing weights' gradient is <dA, A>, so that expert
    outputs are neither saved nor computed again. SAIL-VL2 (arXiv 2509.14033), section 5.2.
    """
    return _experts(
        _FUSED,
        x_TD,
        gate_up_E2FD,
        down_EDF,
        ids_TK,
        weights_TK,
        activation,
        biases,
        clamp,
        recompute,
        main_grads,
        accumulate,
    )


def grouped_experts(
    x_RD: Tensor,
    gate_up_E2FD: GateUp,
    down_EDF: Tensor,
    offsets_E: Tensor,
    weights_R: Tensor | None = None,
    *,
    activation: str = "silu",
    biases: Biases | None = None,
    clamp: float | None = None,
    recompute: bool = False,
    main_grads: MainGrads | None = None,
    accumulate: bool = True,
) -> Tensor:
    """y_r = w_r * down[e] @ (act(gate[e] @ x_r) * (up[e] @ x_r)) for rows r in [offsets[e-1], offsets[e]).

    `fused_experts` for rows that a dispatcher has already sorted by expert (Megatron, torchtitan, DeepSpeed AutoEP,
    DeepEP). Rows past the last offset give zeros and take no gradient.

    Args:
        x_RD: sorted rows; fp32, bf16 or fp16.
        offsets_E: int32 cumulative ends, as `torch.nn.functional.grouped_mm` takes them.
        weights_R: routing weights, fp32 or x's dtype; none: 1.
        Others: as in `fused_experts`.

    Raises:
        ValueError: a wrong rank, size, dtype, device or stride, or offsets that fall or pass R.

    On CUDA: the compiled kernels take bf16 and fp16 alone, Triton's fp32 too; offsets are looked at under
    SAIL_OPS_CHECK=1, which waits for the device, and clamped otherwise.
    """
    return _experts(
        _GROUPED,
        x_RD,
        gate_up_E2FD,
        down_EDF,
        offsets_E,
        weights_R,
        activation,
        biases,
        clamp,
        recompute,
        main_grads,
        accumulate,
    )


def grouped_mm(x_RK: Tensor, w_EKN: Tensor, offsets_E: Tensor) -> Tensor:
    """y[r] = x[r] @ w[e] for rows r in [offsets[e-1], offsets[e]); rows past the last offset give zeros.

    Arguments and layout of `torch.nn.functional.grouped_mm` for 2-D x and 3-D w. w may be contiguous along n or along
    k: `W.transpose(1, 2)` of an [E, n, k] parameter costs no copy, and its gradient is laid out like W.

    Args:
        x_RK: sorted rows; fp32, bf16 or fp16.
        w_EKN: weights of x's dtype.
        offsets_E: int32 cumulative ends.

    Raises:
        ValueError: a wrong rank, size, dtype, device or stride, or offsets that fall or pass R.

    On CUDA: as `grouped_experts`.
    """
    x_RK, w_EKN = _autocast(x_RK, w_EKN)
    if needs_grad("grouped_mm", x_RK, w_EKN):
        out: Tensor = _GroupedMM.apply(x_RK, w_EKN, offsets_E)
        return out
    return _ops.grouped_mm.default(x_RK, w_EKN, offsets_E)


class _Family:
    """The two ops of a kind of expert layer."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.forward = getattr(_ops, name).default
        self.backward = getattr(_ops, name + "_backward").default


_FUSED, _GROUPED = _Family("fused_experts"), _Family("grouped_experts")


def _experts(
    family: _Family,
    x: Tensor,
    gate_up: GateUp,
    down: Tensor,
    where: Tensor,
    weights: Tensor | None,
    activation: str,
    biases: Biases | None,
    clamp: float | None,
    recompute: bool,
    main_grads: MainGrads | None,
    accumulate: bool,
) -> Tensor:
    if activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise ValueError(f"sail_ops.{family.name}: activation: got {activation!r}, expected one of {known}")
    first, up = (gate_up, None) if isinstance(gate_up, Tensor) else gate_up
    bias_1, bias_2 = biases or (None, None)
    x, first, up, down, bias_1, bias_2 = _autocast(x, first, up, down, bias_1, bias_2)
    code = _ACTIVATIONS[activation]
    if needs_grad(family.name, x, first, up, down, weights, bias_1, bias_2):
        main = _main_grads(family, main_grads, up is not None)
        out: Tensor = _Experts.apply(
            family, x, first, up, down, where, weights, bias_1, bias_2, code, clamp, recompute, main, accumulate
        )
        return out
    return family.forward(x, first, up, down, where, weights, bias_1, bias_2, code, clamp, False)[0]


def _main_grads(
    family: _Family, main_grads: MainGrads | None, pair: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(gate_up or gate, up, down) buffers."""
    if main_grads is None:
        return None, None, None
    if len(main_grads) != (3 if pair else 2):
        want = "(gate, up, down)" if pair else "(gate_up, down)"
        raise ValueError(f"sail_ops.{family.name}: main_grads: got {len(main_grads)} buffers, expected {want}")
    return main_grads[0], main_grads[1] if pair else None, main_grads[-1]


def _autocast(x: Tensor, *others: Tensor | None) -> Any:
    """Under autocast floating-point operands take its dtype, as those of torch's matrix products do."""
    if not in_autocast(x):
        return x, *others
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, *others))


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        family,
        x,
        gate_up,
        up,
        down,
        where,
        weights,
        gate_up_bias,
        down_bias,
        activation,
        clamp,
        recompute,
        main,
        accumulate,
    ):
        y, h = family.forward(
            x, gate_up, up, down, where, weights, gate_up_bias, down_bias, activation, clamp, not recompute
        )
        ctx.save_for_backward(x, gate_up, up, down, where, weights, gate_up_bias, down_bias, h)
        ctx.options = family, activation, clamp, main, accumulate
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, gate_up, up, down, where, weights, gate_up_bias, down_bias, h = ctx.saved_tensors
        family, activation, clamp, main, accumulate = ctx.options
        _, need_x, need_gate, need_up, need_down, _, need_w, need_b1, need_b2, *_ = ctx.needs_input_grad
        needs = (
            Need.X * need_x
            | Need.GATE_UP * (need_gate or need_up)
            | Need.DOWN * need_down
            | Need.WEIGHTS * need_w
            | Need.GATE_UP_BIAS * need_b1
            | Need.DOWN_BIAS * need_b2
            | Need.OVERWRITE * (not accumulate)
        )
        dx, dgate_up, dup, ddown, dweights, db1, db2 = family.backward(
            dy.contiguous(),
            x,
            gate_up,
            up,
            down,
            where,
            weights,
            h,
            gate_up_bias,
            down_bias,
            activation,
            clamp,
            needs,
            *main,
        )
        own_1, own_2 = main[0] is None, main[2] is None
        return (
            None,
            dx if need_x else None,
            dgate_up if need_gate and own_1 else None,
            dup if need_up and own_1 else None,
            ddown if need_down and own_2 else None,
            None,
            dweights.to(weights.dtype) if need_w else None,
            db1 if need_b1 else None,
            db2 if need_b2 else None,
            *(None,) * 5,
        )


class _GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, offsets):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, w, offsets)
        return _ops.grouped_mm.default(x, w, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, w, offsets = ctx.saved_tensors
        need_x, need_w, _ = ctx.needs_input_grad
        dx, dw = _ops.grouped_mm_backward.default(dy.contiguous(), x, w, offsets, need_x, need_w)
        return dx if need_x else None, dw if need_w else None, None


# ---- shapes for tracing, and of meta tensors


def _fake_forward(op: str, rows_of: Callable[[Tensor, Tensor], int]) -> None:
    def fake(x, gate_up, up, down, where, weights, gate_up_bias, down_bias, activation, clamp, save_h):  # type: ignore[no-untyped-def]
        _one_device(op, x, gate_up=gate_up, up=up, down=down, ids_or_offsets=where, weights=weights)
        rows = rows_of(x, where) if save_h else 0
        return x.new_empty(x.shape), x.new_empty(rows, 2 * down.shape[2])

    torch.library.register_fake(f"sail_ops::{op}", fake)


def _fake_backward(  # type: ignore[no-untyped-def]
    dy, x, gate_up, up, down, where, weights, h, gate_up_bias, down_bias, activation, clamp, needs, *main
):
    def grad(wanted: bool, like: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        shape = like.shape if wanted and like is not None else (0,)
        return x.new_empty(shape, dtype=dtype or x.dtype)

    own_1, own_2 = main[0] is None, main[2] is None
    return (
        grad(bool(needs & Need.X), x),
        grad(bool(needs & Need.GATE_UP) and own_1, gate_up),
        grad(bool(needs & Need.GATE_UP) and own_1, up),
        grad(bool(needs & Need.DOWN) and own_2, down),
        grad(bool(needs & Need.WEIGHTS), weights, torch.float32),
        grad(bool(needs & Need.GATE_UP_BIAS), gate_up_bias),
        grad(bool(needs & Need.DOWN_BIAS), down_bias),
    )


def _one_device(op: str, x: Tensor, **others: Tensor | None) -> None:
    """The C++ checks see only calls whose tensors are all on one kind of device: a meta tensor brings the call here."""
    for name, t in others.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"sail_ops.{op}: {name}: got a tensor on {t.device}, expected {x.device}, where x is")


_fake_forward("fused_experts", lambda x, ids: x.shape[0] * ids.shape[1])
_fake_forward("grouped_experts", lambda x, offsets: x.shape[0])
torch.library.register_fake("sail_ops::fused_experts_backward", _fake_backward)
torch.library.register_fake("sail_ops::grouped_experts_backward", _fake_backward)


@torch.library.register_fake("sail_ops::grouped_mm")
def _(x, w, offsets):  # type: ignore[no-untyped-def]
    _one_device("grouped_mm", x, w=w, offsets=offsets)
    return x.new_empty(x.shape[0], w.shape[2])


@torch.library.register_fake("sail_ops::grouped_mm_backward")
def _(dy, x, w, offsets, need_x, need_w):  # type: ignore[no-untyped-def]
    dx = x.new_empty(x.shape if need_x else (0,))
    if not need_w:
        return dx, x.new_empty(0)
    E, k, n = w.shape
    along_n = (w.stride(2) == 1 or n == 1) and w.stride(1) >= n
    return dx, x.new_empty(E, k, n) if along_n else x.new_empty(E, n, k).transpose(1, 2)
