"""From inputs to hidden states: pictures encoded, put among the embedded tokens, and decoded.

N tiles, B batch, L sequence, T = B*L tokens, D hidden, M mixture-of-experts layers, E experts, K top-k,
S packed samples.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import MoeModelOutputWithPast

from .attention import Pack, check_cu_seqlens, pack_of, pack_of_padding, packed_positions
from .config import SailVL2Config
from .decoder import Routed

AttentionMask = Tensor | dict[str, Tensor | None] | None  # generate makes a dict for a static cache, by kind of layer


@dataclass
class BackboneOutput(MoeModelOutputWithPast):
    """What `Backbone.forward` returns; a field that does not apply, or was not asked for, is None.

    last_hidden_state: [B, L, D], behind the last norm. image_hidden_states: [N, tokens_per_tile, D].
    `counts_ME` (int64) and `prob_sum_ME` (fp32, with gradient) are `sail_ops.route_topk`'s statistics, a row for each
    mixture-of-experts layer; `num_tokens` (int64 scalar) is how many tokens they count: padding is left out.
    So the layers' balance losses are `sail_ops.load_balancing_loss(counts_ME, prob_sum_ME, num_tokens)`.
    router_logits: M tensors [T, E], with gradient. expert_ids_MTK: [M, T, K] int64, the experts of each token.
    """

    image_hidden_states: Tensor | None = None
    counts_ME: Tensor | None = None
    prob_sum_ME: Tensor | None = None
    num_tokens: Tensor | None = None
    expert_ids_MTK: Tensor | None = None


class Backbone(nn.Module):
    """SAIL-VL2 without its head: what `model.model` and `model.base_model` are.

    A view: its modules are the model's own, which does not register it. So state-dict names stay the released ones,
    and what takes the place of a module in the model takes it here (docs/decisions, model-backbone).
    """

    _tp_plan: Any = None  # transformers asks every `base_model` for these two
    _pp_plan: Any = None

    def __init__(
        self, config: SailVL2Config, vision_model: nn.Module, mlp1: nn.Module, decoder: nn.Module, training: bool
    ) -> None:
        super().__init__()
        self.config, self.training = config, training
        self.vision_model, self.mlp1, self.language_model = vision_model, mlp1, decoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: AttentionMask = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        use_cache: bool | None = None,
        image_features: Tensor | None = None,
        pack: Pack | None = None,
        token_mask: Tensor | None = None,
        expert_ids_MTK: Tensor | None = None,
        output_router_logits: bool | None = None,
        output_expert_ids: bool = False,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
    ) -> BackboneOutput | tuple:
        """Hidden states of all positions, with the routing statistics.

        The arguments are those of `SailVL2ForConditionalGeneration.forward`. `logits_to_keep` is the head's and
        changes nothing: TRL gives both the same arguments.
        """
        if pixel_values is not None and image_features is not None:
            raise ValueError("SailVL2: image_features excludes pixel_values")
        features = image_features if pixel_values is None else self.get_image_features(pixel_values)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.text_config)
        if output_router_logits is None:
            output_router_logits = getattr(self.config.text_config, "output_router_logits", False)
        x_BLD = self._embed(input_ids, inputs_embeds, features, past_key_values)
        if pack is None:
            pack, position_ids = self._layout(x_BLD, cu_seqlens, position_ids, past_key_values)
        elif position_ids is None or cu_seqlens is not None or past_key_values is not None:
            raise ValueError("SailVL2: pack needs position_ids, and excludes cu_seqlens, past_key_values and use_cache")
        hidden_BLD, routed, num_tokens = self._decode(
            x_BLD,
            attention_mask,
            position_ids,
            pack,
            token_mask,
            past_key_values=past_key_values,
            expert_ids_MTK=expert_ids_MTK,
            output_expert_ids=output_expert_ids,
            output_router_logits=output_router_logits,
        )
        output = BackboneOutput(
            last_hidden_state=hidden_BLD,
            past_key_values=past_key_values,
            image_hidden_states=features,
            num_tokens=num_tokens if routed else None,
            **by_layer(routed),
        )
        return output.to_tuple() if return_dict is False else output

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that pictures meet first."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    def get_input_embeddings(self) -> nn.Module:
        return cast(nn.Module, self.language_model.embed_tokens)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Tiles [N, 3, image_size, image_size] -> image tokens [N, tokens_per_tile, D].

        A frozen encoder is run without autograd: activation checkpointing would keep its blocks' inputs.
        """
        learns = pixel_values.requires_grad or any(p.requires_grad for p in self.vision_model.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            features = self.vision_model(pixel_values.to(self.dtype))
        return self.mlp1(features)

    def embed(self, input_ids: Tensor, features: Tensor | None) -> Tensor:
        """Token embeddings [B, L, D], with features [N, tokens_per_tile, D] in the places of image tokens, in order.

        Raises ValueError where places and features differ in number.
        """
        x_BLD = self.get_input_embeddings()(input_ids)
        places = (input_ids == self.config.image_token_id).flatten().nonzero().squeeze(1)
        found = 0 if features is None else features.shape[0] * features.shape[1]
        if len(places) != found:
            raise ValueError(
                f"SailVL2: input_ids holds {len(places)} image tokens (id {self.config.image_token_id}), but"
                f" pixel_values gives {found} image features ({self.config.tokens_per_tile} for each tile)"
            )
        if features is None:
            return x_BLD
        flat = x_BLD.flatten(0, 1).index_copy(0, places, features.flatten(0, 1).to(x_BLD.dtype))
        return flat.view_as(x_BLD)

    def _embed(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        features: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        """Token embeddings [B, L, D], with image features in the places of image tokens."""
        if inputs_embeds is not None:
            if input_ids is not None or features is not None:
                raise ValueError("SailVL2: inputs_embeds excludes input_ids, pixel_values and image_features")
            return inputs_embeds
        if input_ids is None:
            raise ValueError("SailVL2: give input_ids or inputs_embeds")
        if features is None and input_ids.shape[1] == 1 and cache is not None and cache.get_seq_length() > 0:
            # a step of generation; to look for image tokens would wait for the device
            return self.get_input_embeddings()(input_ids)
        return self.embed(input_ids, features)

    def _layout(
        self, x_BLD: Tensor, cu_seqlens: Tensor | None, position_ids: Tensor | None, cache: Cache | None
    ) -> tuple[Pack | None, Tensor]:
        """The pack of `cu_seqlens`, and positions where none are given."""
        batch, length = x_BLD.shape[:2]
        if cu_seqlens is not None:
            if cache is not None:
                raise ValueError("SailVL2: cu_seqlens excludes past_key_values and use_cache")
            check_cu_seqlens(cu_seqlens, batch, length)
            return pack_of(cu_seqlens), packed_positions(cu_seqlens)[None] if position_ids is None else position_ids
        if position_ids is None:
            start = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(start, start + length, device=x_BLD.device)[None]
        return None, position_ids

    def _decode(
        self,
        x_BLD: Tensor,
        attention_mask: AttentionMask,
        position_ids: Tensor,
        pack: Pack | None,
        token_mask_BL: Tensor | None,
        *,
        past_key_values: Cache | None,
        **options: Any,
    ) -> tuple[Tensor, list[Routed], Tensor]:
        """Final hidden states, what each expert layer decided, and the number of tokens that its statistics count."""
        length = x_BLD.shape[1]
        if isinstance(attention_mask, dict):
            attention_mask = attention_mask["full_attention"]
        if attention_mask is not None and attention_mask.dim() == 2:
            if token_mask_BL is None:
                token_mask_BL = attention_mask[:, -length:]
            if pack is None and not attention_mask.all():
                pack = pack_of_padding(attention_mask.bool(), length)
        if pack is None:  # [B, 1, L, S], True where a query may look; None where plain causal attention does
            mask: Any = create_causal_mask(
                self.config.text_config, x_BLD, attention_mask, past_key_values, position_ids=position_ids
            )
        token_mask_T = None if token_mask_BL is None else token_mask_BL.flatten().bool()
        hidden_BLD, routed = self.language_model(
            x_BLD,
            position_ids,
            attention_mask=None if pack else mask,
            pack=pack,
            token_mask_T=token_mask_T,
            past_key_values=past_key_values,
            **options,
        )
        num_tokens = torch.tensor(x_BLD[..., 0].numel()) if token_mask_T is None else token_mask_T.sum()
        return hidden_BLD, routed, num_tokens.to(x_BLD.device)


def by_layer(routed: list[Routed]) -> dict[str, Any]:
    """What the expert layers decided, as fields of `BackboneOutput`."""
    if not routed:
        return {}
    counts, prob_sums, ids, logits = zip(*routed, strict=True)
    return dict(
        counts_ME=torch.stack(counts),
        prob_sum_ME=torch.stack(prob_sums),
        expert_ids_MTK=None if ids[0] is None else torch.stack(ids),
        router_logits=None if logits[0] is None else logits,
    )
