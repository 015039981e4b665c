"""The language-model head and its cross-entropy in one operator: the logits of all tokens never exist."""

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _library  # noqa: F401  (registers the operators)
from ._autograd import in_autocast, needs_grad

_linear_cross_entropy = torch.ops.sail_ops.linear_cross_entropy.default

REDUCTIONS = ("mean", "sum", "none")


@overload
def linear_cross_entropy(
    hidden: Tensor,
    lm_head: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
    token_weights: Tensor | None = None,
    return_logprobs: Literal[False] = False,
) -> Tensor: ...
@overload
def linear_cross_entropy(
    hidden: Tensor,
    lm_head: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
    token_weights: Tensor | None = None,
    return_logprobs: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def linear_cross_entropy(
    hidden: Tensor,
    lm_head: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
    token_weights: Tensor | None = None,
    return_logprobs: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """loss_t = w_t (-log softmax(lm_head @ hidden_t)[label_t] + z_loss lse_t^2), lse = log sum exp of the logits.

    hidden: [..., D], fp32, bf16 or fp16. lm_head: [V, D], the same dtype. labels: [...], int64 or int32 in [0, V), or
    `ignore_index`: such a token has loss 0, gets no gradient and costs nothing.
    reduction: "none" gives loss_t [...], "sum" its sum, "mean" its sum over that of the labeled tokens' w_t, which
    without weights is their number; as in torch a mean over no labeled token is NaN, with a gradient of zeros. fp32.
    z_loss: keeps lse near zero. token_weights: w, [...] fp32, without gradient; 1 by default.
    return_logprobs: also returns log softmax(...)[label_t] [...] in fp32, 0 where ignored, without gradient. To train
    on log-probabilities (RL) take -linear_cross_entropy(..., reduction="none").

    Logits exist for a chunk of tokens at a time, 128 or an eighth of the labeled ones: never [T, V]. "mean" and "sum"
    compute both gradients with the loss, from the same logits: three matrix products. They are kept for the backward,
    which scales them in place: a second backward through one graph raises. "none" cannot know what its tokens'
    gradients will be multiplied by: its backward computes the logits again, and may run twice.
    On CUDA: a chunk is an eighth of all tokens, and ignored ones cost as much as others, as only the device knows them;
    labels are looked at under SAIL_OPS_CHECK=1, which waits for the device.
    Raises ValueError for other shapes, dtypes or strides, and (on the CPU) labels out of range.
    Source: Hsu et al. 2024, "Liger Kernel", section 3.2; the z-loss is Chowdhery et al. 2022, "PaLM", section 5.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"sail_ops.linear_cross_entropy: reduction: got {reduction!r}, expected one of {REDUCTIONS}")
    if hidden.dim() < 1 or hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"sail_ops.linear_cross_entropy: labels: got shape {list(labels.shape)}, expected hidden's without its"
            f" last dimension, of {list(hidden.shape)}"
        )
    if token_weights is not None and token_weights.shape != labels.shape:
        raise ValueError(
            f"sail_ops.linear_cross_entropy: token_weights: got shape {list(token_weights.shape)}, expected labels'"
            f" shape {list(labels.shape)}"
        )
    if in_autocast(hidden):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, lm_head = hidden.to(dtype), lm_head.to(dtype)
    hidden_TD, labels_T = hidden.reshape(labels.numel(), hidden.shape[-1]), labels.reshape(-1)
    weights_T = None if token_weights is None else token_weights.detach().reshape(-1).contiguous()
    args = hidden_TD, lm_head, labels_T, weights_T, ignore_index, z_loss
    grad = needs_grad("linear_cross_entropy", hidden, lm_head, constants=(token_weights,))
    if reduction == "none":
        if grad:
            loss, logprobs_T = _PerToken.apply(*args)
        else:
            logprobs_T, lse_T, _, _ = _linear_cross_entropy(*args, False, False)
            loss = _losses(logprobs_T, lse_T, weights_T, z_loss)
        loss = loss.reshape(labels.shape)
    elif grad:
        loss, logprobs_T = _Reduced.apply(*args, reduction, hidden.requires_grad, lm_head.requires_grad)
    else:
        logprobs_T, lse_T, _, _ = _linear_cross_entropy(*args, False, False)
        loss = _total(logprobs_T, lse_T, weights_T, z_loss) / _count(labels_T, weights_T, ignore_index, reduction)
    return (loss, logprobs_T.reshape(labels.shape)) if return_logprobs else loss


def _losses(logprobs_T: Tensor, lse_T: Tensor, weights_T: Tensor | None, z_loss: float) -> Tensor:
    losses_T = z_loss * lse_T.square() - logprobs_T  # both 0 where ignored
    return losses_T if weights_T is None else losses_T * weights_T


def _total(logprobs_T: Tensor, lse_T: Tensor, weights_T: Tensor | None, z_loss: float) -> Tensor:
    """The sum in fp64, where what the number of threads does to its rounding is far below fp32."""
    return _losses(logprobs_T.double(), lse_T.double(), weights_T, z_loss).sum().float()


def _count(labels_T: Tensor, weights_T: Tensor | None, ignore_index: int, reduction: str) -> Tensor:
    """What the sum is divided by."""
    if reduction == "sum":
        return labels_T.new_ones((), dtype=torch.float32)
    labeled_T = (labels_T != ignore_index).double()
    return (labeled_T if weights_T is None else labeled_T * weights_T).sum().float()


def _fit(
    hidden_TD: Tensor, labels_T: Tensor, weights_T: Tensor | None, ignore_index: int
) -> tuple[Tensor | None, Tensor | float]:
    """The scale that the kept gradients have, and by what they are to be multiplied for those of the sum.

    Only fp16 needs one. A word's gradient is a sum over tokens that leaves its range where the mean's is far within,
    and already divided by their number, probabilities would be zeros: a loss scaler comes later. So the scale is
    as large as the sum of all tokens' largest hidden values allows: 1 without weights, if these sum up to 2^14.
    """
    if hidden_TD.dtype != torch.float16:
        return weights_T, 1.0
    w_T = torch.ones_like(labels_T, dtype=torch.float32) if weights_T is None else weights_T
    size_T = torch.where(labels_T != ignore_index, w_T.abs(), 0)
    largest_T = torch.linalg.vector_norm(hidden_TD, torch.inf, 1).float()  # of ignored tokens it may be NaN
    total = torch.where(size_T == 0, 0, size_T * largest_T).sum()
    # 2^14 is a quarter of the range: the rest is for what z_loss adds, and for rounding
    factor = torch.cat((size_T, total[None] / 2**14)).amax()
    factor = torch.where(factor == 0, 1, factor)
    return w_T / factor, factor


class _Reduced(torch.autograd.Function):
    """Sum or mean: both gradients are computed with the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        lm_head: Tensor,
        labels_T: Tensor,
        weights_T: Tensor | None,
        ignore_index: int,
        z_loss: float,
        reduction: str,
        need_hidden: bool,
        need_lm_head: bool,
    ) -> tuple[Tensor, Tensor]:
        scale_T, factor = _fit(hidden_TD, labels_T, weights_T, ignore_index)
        args = hidden_TD, lm_head, labels_T, scale_T, ignore_index, z_loss
        logprobs_T, lse_T, dhidden, dlm_head = _linear_cross_entropy(*args, need_hidden, need_lm_head)
        count = _count(labels_T, weights_T, ignore_index, reduction)
        # no labels: the gradients are zeros
        ctx.save_for_backward(dhidden, dlm_head, torch.where(count == 0, 0, factor / count))
        ctx.needed = need_hidden, need_lm_head
        ctx.mark_non_differentiable(logprobs_T)
        return _total(logprobs_T, lse_T, weights_T, z_loss) / count, logprobs_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dlm_head, factor = ctx.saved_tensors
        factor = torch.where(factor == 0, 0, grad * factor)
        needed_and_grads = zip(ctx.needed, (dhidden, dlm_head), strict=True)
        # in place: a head's gradient is too large to have twice
        grads = [g.mul_(factor) if needed else None for needed, g in needed_and_grads]
        return *grads, None, None, None, None, None, None, None


class _PerToken(torch.autograd.Function):
    """A loss for each token: the backward computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        lm_head: Tensor,
        labels_T: Tensor,
        weights_T: Tensor | None,
        ignore_index: int,
        z_loss: float,
    ) -> tuple[Tensor, Tensor]:
        logprobs_T, lse_T, _, _ = _linear_cross_entropy(
            hidden_TD, lm_head, labels_T, weights_T, ignore_index, z_loss, False, False
        )
        ctx.save_for_backward(hidden_TD, lm_head, labels_T, weights_T)
        ctx.options = ignore_index, z_loss
        ctx.mark_non_differentiable(logprobs_T)
        return _losses(logprobs_T, lse_T, weights_T, z_loss), logprobs_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, lm_head, labels_T, weights_T = ctx.saved_tensors
        scale_T = grad_T.contiguous() if weights_T is None else grad_T * weights_T
        need_hidden, need_lm_head = ctx.needs_input_grad[:2]
        args = hidden_TD, lm_head, labels_T, scale_T, *ctx.options
        _, _, dhidden, dlm_head = _linear_cross_entropy(*args, need_hidden, need_lm_head)
        return dhidden if need_hidden else None, dlm_head if need_lm_head else None, None, None, None, None


@torch.library.register_fake("sail_ops::linear_cross_entropy")
def _(
    hidden: Tensor,
    lm_head: Tensor,
    labels: Tensor,
    scale: Tensor | None,
    ignore_index: int,
    z_loss: float,
    need_dhidden: bool,
    need_dlm_head: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (T, D), V = hidden.shape, lm_head.shape[0]
    logprobs, lse = (hidden.new_empty(T, dtype=torch.float32) for _ in range(2))
    return logprobs, lse, hidden.new_empty(T if need_dhidden else 0, D), lm_head.new_empty(V if need_dlm_head else 0, D)
