"""The router on blocks of BT tokens: softmax, top-k and the block's share of the batch statistics; and its gradient.

T tokens, E experts padded to BE lanes, K choices padded to BK lanes.
"""

import triton
import triton.language as tl

from .math import exp


@triton.jit
def wide_sum(x, AXIS: tl.constexpr):
    """In fp64: a few additions an element, and the differences taken of such sums cancel."""
    return tl.sum(x.to(tl.float64), AXIS).to(tl.float32)


@triton.jit
def softmax(logits, stride, t, t_ok, e, E):
    """Probabilities [BT, BE] in fp32, 0 in the padding; a NaN among the logits makes a row NaN."""
    ok = t_ok[:, None] & (e < E)[None, :]
    x = tl.load(logits + t[:, None] * stride + e[None, :], mask=ok, other=float("-inf")).to(tl.float32)
    top = tl.max(x, 1)
    p = tl.where((e < E)[None, :], exp(x - top[:, None]), 0.0)
    return tl.div_rn(p, tl.broadcast_to(wide_sum(p, 1)[:, None], p.shape))


@triton.jit(do_not_specialize=("T",))
def route_topk_kernel(
    logits,
    stride,
    bias,
    replay,
    mask,
    weights,
    ids,
    partial_counts,
    partial_sums,
    T,
    E,
    K,
    RENORMALIZE: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
    BK: tl.constexpr,
):
    """weights and ids [T, K]; counts and sums of probabilities over the block's tokens [blocks, E]"""
    block = tl.program_id(0)
    t = block.to(tl.int64) * BT + tl.arange(0, BT)
    t_ok = t < T
    e = tl.arange(0, BE)
    slot = tl.arange(0, BK)
    p = softmax(logits, stride, t, t_ok, e, E)
    score = p
    if bias is not None:
        score += tl.load(bias + e, mask=e < E, other=0.0)[None, :]
    # integers that compare like the scores, NaN above all; below the key of -inf there is room for what is taken
    bits = score.to(tl.int32, bitcast=True)
    key = tl.where(score != score, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    taken = -0x80000000
    key = tl.where((e < E)[None, :], key, taken)
    keep = t_ok
    if mask is not None:
        keep = tl.load(mask + t, mask=t_ok, other=0) != 0
    counts = tl.zeros([BE], tl.int32)
    chosen = tl.zeros([BT, BK], tl.float32)
    for k in range(K):
        if replay is not None:
            best = tl.load(replay + t * K + k, mask=t_ok, other=-1).to(tl.int32)
        else:
            best = tl.min(tl.where(key == tl.max(key, 1)[:, None], e[None, :], BE), 1)  # ties go to the lower id
        hit = e[None, :] == best[:, None]
        key = tl.where(hit, taken, key)
        chosen = tl.where((slot == k)[None, :], tl.sum(tl.where(hit, p, 0.0), 1)[:, None], chosen)
        counts += tl.sum((hit & keep[:, None]).to(tl.int32), 0)
        tl.store(ids + t * K + k, best.to(tl.int64), mask=t_ok)
    if RENORMALIZE:
        chosen = tl.div_rn(chosen, tl.broadcast_to(wide_sum(chosen, 1)[:, None], chosen.shape))
    tl.store(weights + t[:, None] * K + slot[None, :], chosen, mask=t_ok[:, None] & (slot < K)[None, :])
    at = block.to(tl.int64) * E + e
    tl.store(partial_counts + at, counts, mask=e < E)
    tl.store(partial_sums + at, tl.sum(tl.where(keep[:, None], p, 0.0).to(tl.float64), 0), mask=e < E)


@triton.jit(do_not_specialize=("T",))
def route_topk_backward_kernel(
    logits,
    stride,
    ids,
    mask,
    grad_weights,
    grad_prob_sum,
    dlogits,
    T,
    E,
    K,
    RENORMALIZE: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
):
    """dlogits = p (dp - sum(p dp)); dp = grad_prob_sum + scatter(grad_weights), through w = p / sum p if RENORMALIZE"""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    t_ok = t < T
    e = tl.arange(0, BE)
    p = softmax(logits, stride, t, t_ok, e, E)
    dp = tl.zeros([BT, BE], tl.float32)
    if grad_prob_sum is not None:
        keep = t_ok
        if mask is not None:
            keep = tl.load(mask + t, mask=t_ok, other=0) != 0
        dp += tl.where(keep[:, None], tl.load(grad_prob_sum + e, mask=e < E, other=0.0)[None, :], 0.0)
    if grad_weights is not None:
        total = tl.full([BT], 1.0, tl.float64)
        dot = tl.zeros([BT], tl.float64)
        if RENORMALIZE:
            total -= 1.0
            for k in range(K):
                best = tl.load(ids + t * K + k, mask=t_ok, other=-1)
                chosen = tl.sum(tl.where(e[None, :] == best[:, None], p, 0.0), 1).to(tl.float64)
                total += chosen
                dot += chosen * tl.load(grad_weights + t * K + k, mask=t_ok, other=0.0).to(tl.float64)
            dot /= total
        for k in range(K):
            best = tl.load(ids + t * K + k, mask=t_ok, other=-1)
            d = (tl.load(grad_weights + t * K + k, mask=t_ok, other=0.0).to(tl.float64) - dot) / total
            dp += tl.where(e[None, :] == best[:, None], d.to(tl.float32)[:, None], 0.0)
    dlogits += t[:, None] * E + e[None, :]
    result = p * (dp - wide_sum(p * dp, 1)[:, None])
    tl.store(dlogits, result.to(dlogits.dtype.element_ty), mask=t_ok[:, None] & (e < E)[None, :])
