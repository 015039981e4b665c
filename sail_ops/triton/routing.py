"""The router with Triton."""

import torch
from torch import Tensor

from .checks import Check, check_values
from .kernels import routing as kernels
from .launch import blocks, launch, on_device, power_of_two
from .sums import column_sums

_LANES = 2048  # (token, expert) pairs of one program: 16 a thread of 4 warps
_MOST_EXPERTS = 2**14  # lanes of one token that a program can hold in registers


def _tokens(E: int) -> tuple[int, int]:
    """Tokens and lanes of one program."""
    lanes = power_of_two(E, 16, _MOST_EXPERTS)
    return max(1, _LANES // lanes), lanes


def _check_logits(c: Check, logits: Tensor) -> Tensor:
    c.rank("logits_TE", logits, 2)
    rows = c.rows("logits_TE", logits)
    E = rows.shape[1]
    c.that(E <= _MOST_EXPERTS, "logits_TE", f"E = {E}", f"at most {_MOST_EXPERTS} experts")
    return rows


def _check_floats(c: Check, arg: str, t: Tensor | None, logits: Tensor, *shape: int) -> None:
    if t is not None:
        c.same_device(arg, t, logits)
        c.shape(arg, t, *shape)
        c.dtype(arg, t, torch.float32)
        c.contiguous(arg, t)


def _check_mask(c: Check, mask: Tensor | None, logits: Tensor) -> Tensor | None:
    if mask is None:
        return None
    c.same_device("mask_T", mask, logits)
    c.shape("mask_T", mask, logits.shape[0])
    c.dtype("mask_T", mask, torch.bool)
    c.contiguous("mask_T", mask)
    return mask.view(torch.uint8)


def _check_ids(c: Check, ids: Tensor, logits: Tensor, k: int) -> None:
    """An id outside [0, E) has no probability: nothing is read or written for it."""
    T, E = logits.shape
    c.same_device("ids_TK", ids, logits)
    c.shape("ids_TK", ids, T, k)
    c.contiguous("ids_TK", ids)
    c.integer("ids_TK", ids)
    if check_values():
        outside = ids[(ids < 0) | (ids >= E)].tolist()
        if outside:
            c.fail("ids_TK", f"id {outside[0]}", f"ids in [0, {E})")


@on_device
def route_topk(
    logits: Tensor, k: int, renormalize: bool, bias: Tensor | None, ids: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c = Check("route_topk")
    rows = _check_logits(c, logits)
    T, E = rows.shape
    c.that(1 <= k <= E, "k", str(k), f"1 <= k <= E = {E}")
    _check_floats(c, "bias_E", bias, logits, E)
    bits = _check_mask(c, mask, logits)
    if ids is not None:
        _check_ids(c, ids, logits, k)
    tokens, lanes = _tokens(E)
    programs = blocks(T, tokens)
    weights = logits.new_empty(T, k, dtype=torch.float32)
    chosen = logits.new_empty(T, k, dtype=torch.int64)
    counts, prob_sum = logits.new_empty(E, dtype=torch.int64), logits.new_empty(E, dtype=torch.float32)
    partial_counts = logits.new_empty(programs, E, dtype=torch.int32)
    partial_sums = logits.new_empty(programs, E, dtype=torch.float64)
    launch(
        kernels.route_topk_kernel,
        (programs,),
        rows,
        rows.stride(0),
        bias,
        ids,
        bits,
        weights,
        chosen,
        partial_counts,
        partial_sums,
        T,
        E,
        k,
        RENORMALIZE=renormalize,
        BT=tokens,
        BE=lanes,
        BK=power_of_two(k, 1, lanes),
    )
    column_sums(partial_counts, counts)
    column_sums(partial_sums, prob_sum)
    return weights, chosen, counts, prob_sum


@on_device
def route_topk_backward(
    grad_weights: Tensor | None,
    grad_prob_sum: Tensor | None,
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    renormalize: bool,
) -> Tensor:
    c = Check("route_topk_backward")
    c.rank("ids_TK", ids, 2)
    rows = _check_logits(c, logits)
    (T, E), k = rows.shape, ids.shape[1]
    _check_floats(c, "grad_weights_TK", grad_weights, logits, T, k)
    _check_floats(c, "grad_prob_sum_E", grad_prob_sum, logits, E)
    bits = _check_mask(c, mask, logits)
    _check_ids(c, ids, logits, k)
    dlogits = logits.new_empty(T, E)
    tokens, lanes = _tokens(E)
    launch(
        kernels.route_topk_backward_kernel,
        (blocks(T, tokens),),
        rows,
        rows.stride(0),
        ids,
        bits,
        grad_weights,
        grad_prob_sum,
        dlogits,
        T,
        E,
        k,
        RENORMALIZE=renormalize,
        BT=tokens,
        BE=lanes,
    )
    return dlogits
