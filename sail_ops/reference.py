"""What every operator means: plain PyTorch, any dtype, any device, differentiable.

T tokens, D hidden, F expert width, E experts, K top-k, R = T*K routed rows; suffixes on tensors (`x_TD`).
Slow by design. Tests compare the kernels with these functions in fp64, benchmarks name them as baselines.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .types import Biases, GateUp, Routing

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def rms_norm(x: Tensor, weight_D: Tensor, eps: float = 1e-6) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight, reduced in fp32 (fp64 for fp64 inputs), rounded once."""
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight_D.to(wide.dtype)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """s = x + residual (rounded to x's dtype); returns (rms_norm(s), s)."""
    s = x + residual
    return rms_norm(s, weight_D, eps), s


def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, reduced in fp32 (fp64 for fp64 inputs), rounded once."""
    wide = _wide(x)
    centered = wide - wide.mean(-1, keepdim=True)
    y = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps) * weight_D.to(wide.dtype)
    return (y if bias_D is None else y + bias_D.to(wide.dtype)).to(x.dtype)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight_D: Tensor, bias_D: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """s = x + residual (rounded to x's dtype); returns (layer_norm(s), s)."""
    s = x + residual
    return layer_norm(s, weight_D, bias_D, eps), s


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y = x * cos + rotate_half(x) * sin with rotate_half(x) = (-x_high, x_low), for q and k; rounded once."""
    if positions is not None:
        cos, sin = cos[positions.long()], sin[positions.long()]
    if cos.shape[-1] * 2 == q.shape[-1]:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)

    def rotated(x: Tensor) -> Tensor:
        low, high = _wide(x).chunk(2, -1)
        return (_wide(x) * cos + torch.cat((-high, low), -1) * sin).to(x.dtype)

    return rotated(q), rotated(k)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight_A: Tensor,
    k_weight_A: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`rope` of the heads' `rms_norm`, of which the result is rounded to its dtype, as Qwen3 has it."""
    return rope(rms_norm(q, q_weight_A, eps), rms_norm(k, k_weight_A, eps), cos, sin, positions)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """y = silu(gate) * up, computed in fp32 (fp64 for fp64 inputs), rounded once."""
    return (F.silu(_wide(gate)) * _wide(up)).to(gate.dtype)


def attention(
    q_BSHA: Tensor,
    k_BLGA: Tensor,
    v_BLGA: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """out = softmax(softmax_scale * q k^T) v by head; a causal query i sees the keys up to i + L - S.

    Like the eager attention of transformers, it rounds scores and probabilities to q's dtype, with the softmax in fp32.
    """
    S, L, group = q_BSHA.shape[1], k_BLGA.shape[1], q_BSHA.shape[2] // k_BLGA.shape[2]
    q_BHSA, k_BHAL = q_BSHA.transpose(1, 2), k_BLGA.repeat_interleave(group, 2).permute(0, 2, 3, 1)
    v_BHLA = v_BLGA.repeat_interleave(group, 2).transpose(1, 2)
    scores_BHSL = _wide(q_BHSA @ k_BHAL * (q_BSHA.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale))
    seen_SL = torch.ones(S, L, dtype=torch.bool, device=q_BSHA.device)
    if causal:
        seen_SL = seen_SL.tril(L - S)
    none_S1 = ~seen_SL.any(-1, keepdim=True)
    # not -inf, whose softmax has no gradient in a row without a key
    scores_BHSL = scores_BHSL.masked_fill(~seen_SL, torch.finfo(scores_BHSL.dtype).min)
    out_BHSA = scores_BHSL.softmax(-1).masked_fill(none_S1, 0).to(q_BSHA.dtype) @ v_BHLA
    out_BSHA = out_BHSA.transpose(1, 2).contiguous()
    if not return_lse:
        return out_BSHA
    return out_BSHA, scores_BHSL.logsumexp(-1).masked_fill(none_S1.squeeze(-1), -torch.inf)


def attention_varlen(
    q_THA: Tensor,
    k_UGA: Tensor,
    v_UGA: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` within each sequence of a pack; lse is [H, T]."""
    outs, lses = [], []
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    parts = zip(q_THA.split(lengths_q), k_UGA.split(lengths_k), v_UGA.split(lengths_k), strict=True)
    for q, k, v in parts:
        out, lse = attention(q[None], k[None], v[None], causal=causal, softmax_scale=softmax_scale, return_lse=True)
        outs.append(out[0])
        lses.append(lse[0])
    return (torch.cat(outs), torch.cat(lses, -1)) if return_lse else torch.cat(outs)


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """y = x @ weight^T + bias."""
    return F.linear(x, weight_NK, bias_N)


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
    """loss_t = w_t (-log softmax(lm_head @ hidden_t)[label_t] + z_loss lse_t^2), of logits rounded to their dtype."""
    logits = _wide(F.linear(hidden, lm_head))
    labeled = labels != ignore_index
    lse = logits.logsumexp(-1)
    target = logits.gather(-1, labels.long().where(labeled, 0)[..., None]).squeeze(-1)
    logprobs = (target - lse) * labeled
    weights = labeled.to(lse.dtype) if token_weights is None else labeled * token_weights
    losses = weights * (z_loss * lse.square() - logprobs)
    loss = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / weights.sum()}[reduction]
    return (loss, logprobs.detach()) if return_logprobs else loss


def route_topk(
    logits_TE: Tensor,
    k: int,
    *,
    renormalize: bool,
    bias_E: Tensor | None = None,
    ids_TK: Tensor | None = None,
    mask_T: Tensor | None = None,
) -> Routing:
    """p = softmax(logits); ids = top-k of p + bias; weights = p[ids], divided by their sum if `renormalize`."""
    probs_TE = _wide(logits_TE).softmax(-1)
    if ids_TK is None:
        score_TE = probs_TE if bias_E is None else probs_TE + bias_E
        # a stable sort: ties go to the lower expert id
        ids_TK = score_TE.detach().sort(dim=-1, descending=True, stable=True).indices[:, :k]
    ids_TK = ids_TK.long()
    weights_TK = probs_TE.gather(1, ids_TK)
    if renormalize:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    keep_T = torch.ones_like(probs_TE[:, 0], dtype=torch.bool) if mask_T is None else mask_T.bool()
    counts_E = torch.bincount(ids_TK[keep_T].flatten(), minlength=logits_TE.shape[1])
    prob_sum_E = (probs_TE * keep_T[:, None]).sum(0)
    return Routing(weights_TK, ids_TK, counts_E, prob_sum_E)


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
) -> Tensor:
    """y_t = sum_k w_tk * down[e] @ (act(gate[e] @ x_t) * (up[e] @ x_t)), e = ids_tk; ids outside [0, E) add nothing.

    Like the eager loop of transformers, it rounds each expert's output to x's dtype; it then sums in that dtype.
    """
    out_TD = torch.zeros_like(x_TD)
    for e in range(down_EDF.shape[0]):
        token, slot = (ids_TK == e).nonzero(as_tuple=True)
        rows = _expert(x_TD[token], gate_up_E2FD, down_EDF, e, activation, biases, clamp)
        out_TD = out_TD.index_add(0, token, rows * weights_TK[token, slot, None].to(rows.dtype))
    return out_TD


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
) -> Tensor:
    """`fused_experts` on rows sorted by expert: expert e owns rows [offsets[e-1], offsets[e]); tail rows give 0."""
    parts, start = [], 0
    for e, end in enumerate(offsets_E.tolist()):
        rows = _expert(x_RD[start:end], gate_up_E2FD, down_EDF, e, activation, biases, clamp)
        parts.append(rows if weights_R is None else rows * weights_R[start:end, None].to(rows.dtype))
        start = end
    parts.append(torch.zeros_like(x_RD[start:]))
    return torch.cat(parts)


def grouped_mm(x_RK: Tensor, w_EKN: Tensor, offsets_E: Tensor) -> Tensor:
    """y[r] = x[r] @ w[e] for r in [offsets[e-1], offsets[e]); tail rows give 0."""
    parts, start = [], 0
    for e, end in enumerate(offsets_E.tolist()):
        parts.append(x_RK[start:end] @ w_EKN[e])
        start = end
    parts.append(x_RK.new_zeros(x_RK.shape[0] - start, w_EKN.shape[2]))
    return torch.cat(parts)


def gated_activation(gate: Tensor, up: Tensor, activation: str = "silu", clamp: float | None = None) -> Tensor:
    """act(gate) * up; with `clamp` = c first gate = min(gate, c), up = min(max(up, -c), c)."""
    if clamp is not None:
        gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
    return ACTIVATIONS[activation](gate) * up


def _expert(
    x_ND: Tensor,
    gate_up: GateUp,
    down: Tensor,
    e: int,
    activation: str,
    biases: Biases | None,
    clamp: float | None,
) -> Tensor:
    gate_up_e = gate_up[e] if isinstance(gate_up, Tensor) else torch.cat([gate_up[0][e], gate_up[1][e]])
    bias_1, bias_2 = (None, None) if biases is None else (biases[0][e], biases[1][e])
    gate, up = F.linear(x_ND, gate_up_e, bias_1).chunk(2, -1)
    return F.linear(gated_activation(gate, up, activation, clamp), down[e], bias_2)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
