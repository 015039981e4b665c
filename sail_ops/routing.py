"""The router of a mixture of experts: which experts a token visits, with what weight, and how evenly they are used."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _library  # noqa: F401  (registers the operators)
from ._autograd import needs_grad
from .types import Routing

_route_topk = torch.ops.sail_ops.route_topk.default
_route_topk_backward = torch.ops.sail_ops.route_topk_backward.default


def route_topk(
    logits_TE: Tensor,
    k: int,
    *,
    renormalize: bool,
    bias_E: Tensor | None = None,
    ids_TK: Tensor | None = None,
    mask_T: Tensor | None = None,
) -> Routing:
    """p = softmax(logits) in fp32; ids = top-k of p + bias; weights = p[ids], divided by their sum if `renormalize`.

    logits_TE: [T, E], fp32, bf16 or fp16, rows contiguous. Ties go to the lower expert id; NaN counts as largest.
    bias_E: [E] fp32, moves the choice only, not the weights, and gets no gradient.
    ids_TK: [T, k] int32 or int64 in [0, E): replays this routing instead of choosing one.
    mask_T: [T] bool, False leaves a token (padding) out of the statistics.
    Returns Routing(weights_TK fp32, ids_TK int64, counts_E int64, prob_sum_E fp32). counts_E: how many routed rows
    each expert gets; prob_sum_E: the sum of p over the tokens. The same for any number of threads.
    Gradients flow to the logits from weights_TK and prob_sum_E. Saved for backward: logits and ids.
    On CUDA: at most 3,072 experts (Triton's kernel: 16,384) and 2^31 - 1 tokens; ids_TK is looked at under
    SAIL_OPS_CHECK=1, which waits for the device.
    Raises ValueError for other shapes, dtypes or strides, k outside [1, E], and (on the CPU) ids outside [0, E).
    Source: Shazeer et al. 2017; the bias is DeepSeek-V3's (section 2.1.2).
    """
    if needs_grad("route_topk", logits_TE, constants=(bias_E,)):
        return Routing(*_RouteTopk.apply(logits_TE, k, renormalize, bias_E, ids_TK, mask_T))
    return Routing(*_route_topk(logits_TE, k, renormalize, bias_E, ids_TK, mask_T))


def load_balancing_loss(
    counts_E: Tensor,
    prob_sum_E: Tensor,
    num_tokens: int | Tensor,
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """E * sum_e f_e P_e with f = counts / num_tokens, P = prob_sum / num_tokens: k when balanced, larger otherwise.

    counts_E, prob_sum_E: [E] of one layer, from `route_topk`, or stacked [M, E] of M layers that saw the same tokens.
    num_tokens: how many tokens they count, int or scalar.
    Returns fp32, a scalar or [M], differentiable in prob_sum_E. No tokens at all give 0. Layers stay apart: pooled,
    those that each collapsed onto other experts would look balanced.
    group: first sums all three over its ranks, in one collective, so that every rank returns the loss of the whole
    batch. The backward sums over the ranks too: once data-parallel training has averaged the gradients, they are
    those of one process that saw all tokens.
    Raises ValueError where counts_E and prob_sum_E differ in shape.
    Source: Fedus et al. 2021, "Switch Transformers", section 2.2; over all ranks as in the SAIL-VL2 report.
    """
    if counts_E.shape != prob_sum_E.shape:
        raise ValueError(
            f"load_balancing_loss: counts_E, prob_sum_E: got shapes {list(counts_E.shape)} and"
            f" {list(prob_sum_E.shape)}, want one for both"
        )
    n = torch.as_tensor(num_tokens, dtype=torch.float32, device=prob_sum_E.device)
    shape, E = counts_E.shape, counts_E.shape[-1]
    stats = torch.cat([counts_E.to(torch.float32).flatten(), prob_sum_E.to(torch.float32).flatten(), n.reshape(1)])
    if group is not None:
        stats = _AllReduceSum.apply(stats, group)
    counts_E, prob_sum_E = stats[:-1].view(2, *shape)
    n = stats[-1].detach().clamp(min=1)
    return E * (counts_E.detach() / n * (prob_sum_E / n)).sum(-1)


class _RouteTopk(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        k: int,
        renormalize: bool,
        bias_E: Tensor | None,
        ids_TK: Tensor | None,
        mask_T: Tensor | None,
    ) -> tuple[Tensor, ...]:
        weights_TK, ids_TK, counts_E, prob_sum_E = _route_topk(logits_TE, k, renormalize, bias_E, ids_TK, mask_T)
        ctx.save_for_backward(logits_TE, ids_TK, mask_T)
        ctx.renormalize = renormalize
        ctx.mark_non_differentiable(ids_TK, counts_E)
        ctx.set_materialize_grads(False)
        return weights_TK, ids_TK, counts_E, prob_sum_E

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits_TE, ids_TK, mask_T = ctx.saved_tensors
        grad_weights_TK, _, _, grad_prob_sum_E = (None if g is None else g.contiguous() for g in grads)
        dlogits_TE = _route_topk_backward(grad_weights_TK, grad_prob_sum_E, logits_TE, ids_TK, mask_T, ctx.renormalize)
        return dlogits_TE, None, None, None, None, None


class _AllReduceSum(torch.autograd.Function):
    """Sum over the ranks of a group; its transpose is the same sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


@torch.library.register_fake("sail_ops::route_topk")
def _(
    logits: Tensor, k: int, renormalize: bool, bias: Tensor | None, ids: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    T, E = logits.shape
    return (
        logits.new_empty(T, k, dtype=torch.float32),
        logits.new_empty(T, k, dtype=torch.int64),
        logits.new_empty(E, dtype=torch.int64),
        logits.new_empty(E, dtype=torch.float32),
    )


@torch.library.register_fake("sail_ops::route_topk_backward")
def _(
    grad_weights: Tensor | None,
    grad_prob_sum: Tensor | None,
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    renormalize: bool,
) -> Tensor:
    return logits.new_empty(logits.shape)
