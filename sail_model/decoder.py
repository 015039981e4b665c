"""The language model: Qwen3, dense or mixture of experts.

B batch, L sequence, T = B*L tokens, D hidden, E experts, K top-k, I expert width, H query heads, G key/value heads,
A head dim.
Grouped-query attention with RMSNorm on q and k before RoPE; SwiGLU or routed experts. Modules carry the names of the
released checkpoint. Source: Qwen3 technical report (arXiv 2505.09388), section 2.
"""

from collections.abc import Iterator
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

import sail_ops

from .attention import Pack, causal_attention
from .config import is_moe_layer
from .layers import Linear, RMSNorm, residual_linear, residual_scale

Rotation = tuple[Tensor, Tensor]  # cos, sin: [B, L, A/2]


class Routed(NamedTuple):
    """What one mixture-of-experts layer decided; `counts_E` and `prob_sum_E` are `sail_ops.route_topk`'s."""

    counts_E: Tensor
    prob_sum_E: Tensor
    ids_TK: Tensor | None  # where they were asked for,
    logits_TE: Tensor | None  # as for these


class LanguageModel(nn.Module):
    """The decoder and the head that turns hidden states into vocabulary logits."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.model = Decoder(config)
        self.lm_head: nn.Module = Linear(config.hidden_size, config.vocab_size, bias=False)


class Decoder(nn.Module):
    """Embedded tokens [B, L, D] -> final hidden states [B, L, D] and a `Routed` for each mixture-of-experts layer."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_BLD: Tensor,
        positions_BL: Tensor,
        *,
        attention_mask: Tensor | None = None,
        pack: Pack | None = None,
        token_mask_T: Tensor | None = None,
        past_key_values: Cache | None = None,
        expert_ids_MTK: Tensor | None = None,
        output_expert_ids: bool = False,
        output_router_logits: bool = False,
    ) -> tuple[Tensor, list[Routed]]:
        """`attention_mask` or `pack` as for `causal_attention`; `token_mask_T` is True where statistics count.

        `expert_ids_MTK` replays the routing of M mixture-of-experts layers; another M raises ValueError.
        """
        rotation = rotary_tables(positions_BL, self.config)
        replayed = self._replayed(expert_ids_MTK)
        routed = []
        for layer in self.layers:
            x_BLD, counts_E, prob_sum_E, ids_TK, logits_TE = layer(
                x_BLD,
                rotation,
                attention_mask=attention_mask,
                pack=pack,
                token_mask_T=token_mask_T,
                past_key_values=past_key_values,
                expert_ids_TK=next(replayed) if layer.is_moe else None,
            )
            if layer.is_moe:
                kept = ids_TK if output_expert_ids else None, logits_TE if output_router_logits else None
                routed.append(Routed(counts_E, prob_sum_E, *kept))
        return self.norm(x_BLD), routed

    def _replayed(self, expert_ids_MTK: Tensor | None) -> Iterator[Tensor | None]:
        """The ids of each mixture-of-experts layer in turn."""
        count = sum(is_moe_layer(self.config, i) for i in range(len(self.layers)))
        if expert_ids_MTK is None:
            return repeat(None, count)
        if len(expert_ids_MTK) != count:
            raise ValueError(
                f"SailVL2: expert_ids_MTK is of {len(expert_ids_MTK)} layers, wanted [{count}, T, K]: the model has"
                f" {count} mixture-of-experts layers"
            )
        return iter(expert_ids_MTK)


class DecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + mlp(norm(x)); the mlp is dense or routed.

    Returns x and the fields of `Routed`, None for a dense layer, side by side: reentrant activation checkpointing
    loses the gradient of a tensor inside a nested tuple.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.is_moe = is_moe_layer(config, layer_idx)
        self.mlp = SparseMoe(config) if self.is_moe else MLP(config)

    def forward(
        self,
        x_BLD: Tensor,
        rotation: Rotation,
        *,
        attention_mask: Tensor | None,
        pack: Pack | None,
        token_mask_T: Tensor | None,
        past_key_values: Cache | None,
        expert_ids_TK: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        attended = self.self_attn(self.input_layernorm(x_BLD), rotation, attention_mask, pack, past_key_values)
        normed, x_BLD = self.post_attention_layernorm.add(attended, x_BLD)
        if self.is_moe:
            y_BLD, routed = self.mlp(normed, token_mask_T, expert_ids_TK)
            return x_BLD + y_BLD, *routed
        return x_BLD + self.mlp(normed), None, None, None, None


class Attention(nn.Module):
    """Causal grouped-query attention; q and k are normalized per head, then rotated."""

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = head_dim(config)
        q_width, kv_width = (
            heads * self.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = Linear(config.hidden_size, q_width, bias=False)
        self.k_proj = Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = residual_linear(q_width, config.hidden_size, config.num_hidden_layers)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self,
        x_BLD: Tensor,
        rotation: Rotation,
        attention_mask: Tensor | None,
        pack: Pack | None,
        past_key_values: Cache | None,
    ) -> Tensor:
        heads = (-1, self.head_dim)
        q_BLHA, k_BLGA, v_BLGA = (p(x_BLD).unflatten(-1, heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        weights = self.q_norm.weight, self.k_norm.weight
        q_BLHA, k_BLGA = sail_ops.qk_norm_rope(q_BLHA, k_BLGA, *weights, *rotation, self.q_norm.eps)
        if past_key_values is not None:
            k, v = past_key_values.update(k_BLGA.transpose(1, 2), v_BLGA.transpose(1, 2), self.layer_idx)
            k_BLGA, v_BLGA = k.transpose(1, 2), v.transpose(1, 2)
        out_BLHA = causal_attention(q_BLHA, k_BLGA, v_BLGA, mask=attention_mask, pack=pack)
        return self.o_proj(out_BLHA.flatten(2))


class MLP(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x))."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = residual_linear(config.intermediate_size, config.hidden_size, config.num_hidden_layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(sail_ops.swiglu(self.gate_proj(x), self.up_proj(x)))


class SparseMoe(nn.Module):
    """y = sum over the top K experts of weight * expert(x), through `sail_ops.route_topk` and `fused_experts`."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.top_k, self.renormalize = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config)

    def forward(
        self, x_BLD: Tensor, token_mask_T: Tensor | None, ids_TK: Tensor | None = None
    ) -> tuple[Tensor, Routed]:
        """`ids_TK`: the experts to take instead of those that the router would choose."""
        x_TD = x_BLD.flatten(0, 1)
        logits_TE = self.gate(x_TD)
        weights_TK, ids_TK, counts_E, prob_sum_E = sail_ops.route_topk(
            logits_TE, self.top_k, renormalize=self.renormalize, ids_TK=ids_TK, mask_T=token_mask_T
        )
        y_TD = self.experts(x_TD, ids_TK, weights_TK)
        return y_TD.view_as(x_BLD), Routed(counts_E, prob_sum_E, ids_TK, logits_TE)


class Experts(nn.Module):
    """All experts of a layer in two parameters: gate_up_proj [E, 2I, D], gate rows first, and down_proj [E, D, I]."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        e, i, d = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(e, 2 * i, d))
        self.down_proj = nn.Parameter(torch.empty(e, d, i))
        self.down_init_scale = residual_scale(config.num_hidden_layers)

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return sail_ops.fused_experts(x_TD, self.gate_up_proj, self.down_proj, ids_TK, weights_TK)


def head_dim(config: PreTrainedConfig) -> int:
    """A: `head_dim` where the config has one, which need not be hidden_size / heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rotary_tables(positions_BL: Tensor, config: PreTrainedConfig) -> Rotation:
    """cos and sin of position / theta^(2i/A), fp32, [B, L, A/2].

    Computed anew in each step: a buffer would lose its precision when an engine casts the model to bf16.
    """
    dim = head_dim(config)
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=positions_BL.device) / dim
    inverse_frequencies = 1.0 / config.rope_parameters["rope_theta"] ** exponents
    angles = positions_BL[..., None].float() * inverse_frequencies
    return angles.cos(), angles.sin()
