"""SAIL-VL2 without its head: tokens and pictures in, final hidden states and routing statistics out.

N tiles, B batch, L sequence, T = B*L tokens, D hidden, M mixture-of-experts layers, E experts, K top-k.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.utils.generic import ModelOutput

from .attention import Pack, check_cu_seqlens, pack_of, pack_of_padding, packed_positions
from .decoder import Routed

if TYPE_CHECKING:
    from .model import SailVL2ForConditionalGeneration


@dataclass
class SailVL2ModelOutput(ModelOutput):
    """What the backbone returns; a field that does not apply is None.

    `counts_ME` (int64) and `prob_sum_ME` (fp32, with gradient) are `sail_ops.route_topk`'s statistics, a row for each
    mixture-of-experts layer; `num_tokens` (int64 scalar) is how many tokens they count: padding is left out.
    So the balance loss of layer m is `sail_ops.load_balancing_loss(counts_ME[m], prob_sum_ME[m], num_tokens)`.
    `expert_ids_MTK` (int64, on request) are the experts that each token went to.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    image_hidden_states: Tensor | None = None
    counts_ME: Tensor | None = None
    prob_sum_ME: Tensor | None = None
    num_tokens: Tensor | None = None
    expert_ids_MTK: Tensor | None = None


class SailVL2Model(nn.Module):
    """Encoder, adapter and decoder of a `SailVL2ForConditionalGeneration`, whose modules these stay.

    A view that `model.model` makes anew each time: it has no parameters or names of its own, so the state dict keeps
    the released names, and a module that somebody has replaced (PEFT does) is replaced here too.
    """

    def __init__(self, owner: "SailVL2ForConditionalGeneration") -> None:
        super().__init__()
        self.config = owner.config
        self.vision_model, self.mlp1 = owner.vision_model, owner.mlp1
        self.decoder = owner.language_model.model
        self.training = owner.training

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        use_cache: bool | None = None,
        image_features: Tensor | None = None,
        pack: Pack | None = None,
        token_mask: Tensor | None = None,
        expert_ids_MTK: Tensor | None = None,
        output_expert_ids: bool = False,
    ) -> SailVL2ModelOutput:
        """hidden [B, L, D] after the last norm. The arguments of `SailVL2ForConditionalGeneration.forward`, and:

        pack: in place of cu_seqlens, sequences made beforehand, which may share keys; needs position_ids.
        token_mask: bool [B, L], True where a token counts in the routing statistics; by default all but padding.
        expert_ids_MTK: int64 [M, B*L, K], sends each token to these experts again (replay) in place of the top K.
        output_expert_ids: return the experts that were taken.
        """
        if pixel_values is not None and image_features is not None:
            raise ValueError("SailVL2: image_features excludes pixel_values")
        features = image_features if pixel_values is None else self.get_image_features(pixel_values)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.text_config)
        x_BLD = self._embed(input_ids, inputs_embeds, features, past_key_values)
        batch, length = x_BLD.shape[:2]
        if isinstance(attention_mask, dict):  # what generate makes for a static cache, by kind of layer
            attention_mask = attention_mask["full_attention"]
        if position_ids is None:
            position_ids = self._positions(x_BLD, past_key_values, cu_seqlens)
        if attention_mask is not None and attention_mask.dim() == 2 and token_mask is None:
            token_mask = attention_mask[:, -length:].bool()
        pack = pack or self._pack(x_BLD, attention_mask, past_key_values, cu_seqlens)
        mask = None
        if pack is None:
            mask = create_causal_mask(
                self.config.text_config, x_BLD, attention_mask, past_key_values, position_ids=position_ids
            )
        hidden_BLD, routed = self.decoder(
            x_BLD,
            position_ids,
            attention_mask=cast(Tensor | None, mask),
            pack=pack,
            token_mask_T=None if token_mask is None else token_mask.flatten(),
            past_key_values=past_key_values,
            expert_ids_MTK=expert_ids_MTK,
        )
        num_tokens = torch.tensor(batch * length, device=x_BLD.device) if token_mask is None else token_mask.sum()
        return _output(hidden_BLD, past_key_values, features, routed, num_tokens, output_expert_ids)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Tiles [N, 3, image_size, image_size] -> image tokens [N, tokens_per_tile, D]."""
        dtype = next(self.mlp1.parameters()).dtype
        return self.mlp1(self.vision_model(pixel_values.to(dtype)))

    def embed(self, input_ids: Tensor, features: Tensor | None) -> Tensor:
        """Token embeddings [B, L, D], with features [N, tokens_per_tile, D] in the places of image tokens, in order.

        Raises ValueError where places and features differ in number.
        """
        x_BLD = self.decoder.embed_tokens(input_ids)
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
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, features: Tensor | None, cache: Cache | None
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
            return self.decoder.embed_tokens(input_ids)
        return self.embed(input_ids, features)

    def _positions(self, x_BLD: Tensor, cache: Cache | None, cu_seqlens: Tensor | None) -> Tensor:
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, *x_BLD.shape[:2])
            return packed_positions(cu_seqlens)[None]
        start = 0 if cache is None else cache.get_seq_length()
        return torch.arange(start, start + x_BLD.shape[1], device=x_BLD.device)[None]

    def _pack(
        self, x_BLD: Tensor, attention_mask: Tensor | None, cache: Cache | None, cu_seqlens: Tensor | None
    ) -> Pack | None:
        """The sequences of a packed stream, or of a batch with padding; None for one that has neither."""
        if cu_seqlens is not None:
            if cache is not None:
                raise ValueError("SailVL2: cu_seqlens excludes past_key_values and use_cache")
            check_cu_seqlens(cu_seqlens, *x_BLD.shape[:2])
            return pack_of(cu_seqlens)
        if attention_mask is not None and attention_mask.dim() == 2 and not attention_mask.all():
            return pack_of_padding(attention_mask.bool(), x_BLD.shape[1])
        return None


def _output(
    hidden_BLD: Tensor,
    cache: Cache | None,
    features: Tensor | None,
    routed: list[Routed],
    num_tokens: Tensor,
    output_expert_ids: bool,
) -> SailVL2ModelOutput:
    output = SailVL2ModelOutput(last_hidden_state=hidden_BLD, past_key_values=cache, image_hidden_states=features)
    if routed:
        output.counts_ME = torch.stack([layer.counts_E for layer in routed])
        output.prob_sum_ME = torch.stack([layer.prob_sum_E for layer in routed])
        output.num_tokens = num_tokens
        if output_expert_ids:
            output.expert_ids_MTK = torch.stack([layer.ids_TK for layer in routed])
    return output
