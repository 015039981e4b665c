"""SAIL-VL2 as one Hugging Face model: SAIL-ViT, `mlp1`, Qwen3.

N tiles, B batch, L sequence, D hidden, V vocabulary, M mixture-of-experts layers, E experts, S packed samples.
Single-device code; parallelism, engines and the loss on the routing statistics live in `training`.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.utils.generic import ModelOutput

from .attention import Pack, check_cu_seqlens, pack_of, pack_of_padding, packed_positions
from .config import SailVL2Config
from .decoder import Experts, LanguageModel, Statistics
from .generation import TileGenerationMixin
from .projector import Projector
from .vision import Preprocessor, SailViT

IGNORE_INDEX = -100


@dataclass
class SailVL2Output(ModelOutput):
    """What `SailVL2ForConditionalGeneration.forward` returns; a field that does not apply is None.

    `counts_ME` (int64) and `prob_sum_ME` (fp32, with gradient) are `sail_ops.route_topk`'s statistics, a row for each
    mixture-of-experts layer; `num_tokens` (int64 scalar) is how many tokens they count: padding is left out.
    So the balance loss of layer m is `sail_ops.load_balancing_loss(counts_ME[m], prob_sum_ME[m], num_tokens)`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    image_hidden_states: Tensor | None = None
    counts_ME: Tensor | None = None
    prob_sum_ME: Tensor | None = None
    num_tokens: Tensor | None = None


class SailVL2ForConditionalGeneration(PreTrainedModel, TileGenerationMixin):
    """Pictures and text in, next-token logits out. See `forward` for the arguments."""

    config_class = SailVL2Config
    config: SailVL2Config
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # the Trainer's num_items_in_batch, with which accumulated batches are one batch
    _supports_sdpa = True
    _no_split_modules = ["Block", "DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _tied_weights_keys = {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"}

    def __init__(self, config: SailVL2Config) -> None:
        super().__init__(config)
        # The mask helpers of transformers read it from the text config, which is no sub-model's own here.
        self.config.text_config._attn_implementation = self.config._attn_implementation
        self.vision_model = SailViT(config.vision_config)
        self.mlp1 = Projector(config)
        self.language_model = LanguageModel(config.text_config)
        self.post_init()
        # An image token that the model wrote would have no features.
        self.generation_config.suppress_tokens = [config.image_token_id]

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        image_features: Tensor | None = None,
    ) -> SailVL2Output | tuple:
        """loss = mean over labelled positions of -log p(token); also logits, cache and routing statistics.

        input_ids [B, L] int64; or inputs_embeds [B, L, D] instead, then without pictures.
        pixel_values [N, 3, image_size, image_size]: the tiles of all pictures of the batch, in the order in which their
            image tokens appear. Each tile fills `config.tokens_per_tile` positions holding `config.image_token_id`.
        image_features [N, tokens_per_tile, D] in its place: what `get_image_features` gave for those tiles.
        attention_mask [B, L] (with a cache: [B, past + L]), 1 = token, 0 = padding, on either side; or bool
            [B, 1, L, past + L], True where a query may look, which leaves no token out of the routing statistics.
        position_ids [B, L]; by default they count from 0, or from the length of the cache.
        past_key_values: a transformers Cache, which is extended; with use_cache=True one is made where none is given.
        labels [B, L], aligned with input_ids: position i is predicted from i - 1; -100 is ignored. The first token of
            a sequence, or of a packed sample, is never predicted.
        cu_seqlens [S+1] int32 or int64, for a PACKED stream (B = 1, no cache): sample s is
            [cu_seqlens[s], cu_seqlens[s+1]); positions start at 0 and attention is blocked in every sample. Several
            streams are one long stream. Padding needs samples of its own; attention_mask [1, L] then only says which
            tokens the routing statistics leave out.
        logits_to_keep: compute logits for the last n positions (0: all), or for these positions (int64 [n]). The loss
            is over the same positions, so those whose next token is labelled give the full loss in less memory.
        num_items_in_batch: divide the summed loss by this instead of by the number of labelled positions.
        return_dict=False returns the fields that are not None as a tuple.

        Raises ValueError where image tokens and image features differ in number, or for arguments that exclude
        each other; nothing is ever truncated.
        """
        if pixel_values is not None and image_features is not None:
            raise ValueError("SailVL2: image_features excludes pixel_values")
        features = image_features if pixel_values is None else self.get_image_features(pixel_values)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.text_config)
        x_BLD = self._embed(input_ids, inputs_embeds, features, past_key_values)
        hidden_BLD, statistics, num_tokens = self._decode(
            x_BLD, attention_mask, position_ids, past_key_values, cu_seqlens
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.language_model.lm_head(hidden_BLD[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=None,
                shift_labels=next_tokens(labels, cu_seqlens)[:, keep],
                vocab_size=self.config.text_config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        output = SailVL2Output(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            image_hidden_states=features,
            counts_ME=torch.stack([counts_E for counts_E, _ in statistics]) if statistics else None,
            prob_sum_ME=torch.stack([prob_sum_E for _, prob_sum_E in statistics]) if statistics else None,
            num_tokens=num_tokens if statistics else None,
        )
        return output.to_tuple() if return_dict is False else output

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Tiles [N, 3, image_size, image_size] -> image tokens [N, tokens_per_tile, D]."""
        return self.mlp1(self.vision_model(pixel_values.to(self.dtype)))

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.lm_head = new_embeddings

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

    def _decode(
        self,
        x_BLD: Tensor,
        attention_mask: Tensor | dict[str, Tensor | None] | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, list[Statistics], Tensor]:
        """Final hidden states, routing statistics, and the number of tokens that these count."""
        batch, length = x_BLD.shape[:2]
        pack: Pack | None = None
        if cu_seqlens is not None:
            if cache is not None:
                raise ValueError("SailVL2: cu_seqlens excludes past_key_values and use_cache")
            check_cu_seqlens(cu_seqlens, batch, length)
            pack = pack_of(cu_seqlens)
            if position_ids is None:
                position_ids = packed_positions(cu_seqlens)[None]
        elif position_ids is None:
            start = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(start, start + length, device=x_BLD.device)[None]
        if isinstance(attention_mask, dict):  # what generate makes for a static cache, by kind of layer
            attention_mask = attention_mask["full_attention"]
        token_mask_T = None
        if attention_mask is not None and attention_mask.dim() == 2:
            token_mask_T = attention_mask[:, -length:].flatten().bool()
            if pack is None and not attention_mask.all():
                pack = pack_of_padding(attention_mask.bool(), length)
        hidden_BLD, statistics = self.language_model.model(
            x_BLD,
            position_ids,
            attention_mask=None if pack else self._causal_mask(x_BLD, attention_mask, position_ids, cache),
            pack=pack,
            token_mask_T=token_mask_T,
            past_key_values=cache,
        )
        num_tokens = torch.tensor(batch * length) if token_mask_T is None else token_mask_T.sum()
        return hidden_BLD, statistics, num_tokens.to(x_BLD.device)

    def _causal_mask(
        self, x_BLD: Tensor, attention_mask: Tensor | None, position_ids: Tensor, cache: Cache | None
    ) -> Tensor | None:
        """[B, 1, L, S], True where a query may look; None where plain causal attention does."""
        mask = create_causal_mask(self.config.text_config, x_BLD, attention_mask, cache, position_ids=position_ids)
        return cast(Tensor | None, mask)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """normal(0, initializer_range), smaller where a layer writes to the residual stream; biases 0, norms 1.

        Runs on modules that own parameters; transformers skips the others.
        """
        super()._init_weights(module)
        std = self.config.text_config.initializer_range
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=std * getattr(module, "init_scale", 1.0))
        elif isinstance(module, Experts):
            init.normal_(module.gate_up_proj, std=std)
            init.normal_(module.down_proj, std=std * module.down_init_scale)
        elif isinstance(module, Preprocessor):
            init.normal_(module.pos_embed, std=std)


def next_tokens(labels_BL: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The label that each position predicts: the next one, or -100 at the end of a sequence or packed sample."""
    following_BL = labels_BL.roll(-1, dims=1)
    following_BL[:, -1] = IGNORE_INDEX
    if cu_seqlens is not None:
        following_BL[:, cu_seqlens[1:].long() - 1] = IGNORE_INDEX
    return following_BL
