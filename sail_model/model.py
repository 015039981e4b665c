"""SAIL-VL2 as one Hugging Face model: SAIL-ViT, `mlp1`, Qwen3.

N tiles, B batch, L sequence, D hidden, V vocabulary, M mixture-of-experts layers, E experts, S packed samples.
Single-device code; parallelism, engines and the loss on the routing statistics live in `training`.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import ModelOutput

import sail_ops

from .backbone import SailVL2Model
from .config import SailVL2Config
from .decoder import Experts, LanguageModel
from .generation import TileGenerationMixin
from .layers import Linear
from .projector import Projector
from .vision import Preprocessor, SailViT

IGNORE_INDEX = -100


@dataclass
class SailVL2Output(ModelOutput):
    """What `SailVL2ForConditionalGeneration.forward` returns; a field that does not apply is None.

    `counts_ME` (int64) and `prob_sum_ME` (fp32, with gradient) are `sail_ops.route_topk`'s statistics, a row for each
    mixture-of-experts layer; `num_tokens` (int64 scalar) is how many tokens they count: padding is left out.
    So the balance loss of layer m is `sail_ops.load_balancing_loss(counts_ME[m], prob_sum_ME[m], num_tokens)`.
    `aux_loss` is their mean, without its coefficient.
    """

    loss: Tensor | None = None
    aux_loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    image_hidden_states: Tensor | None = None
    counts_ME: Tensor | None = None
    prob_sum_ME: Tensor | None = None
    num_tokens: Tensor | None = None
    expert_ids_MTK: Tensor | None = None


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
        skip_logits: bool | None = None,
        output_router_logits: bool | None = None,
        expert_ids_MTK: Tensor | None = None,
        output_expert_ids: bool = False,
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

        skip_logits: with labels, leave the logits out, and with them most of the memory: the loss is made from hidden
            states (`sail_ops.linear_cross_entropy`). By default so in training mode alone, as Liger has it.
        output_router_logits: as in transformers' mixtures, by default the text config's: adds router_aux_loss_coef *
            aux_loss to the loss, aux_loss being the mean over expert layers of `sail_ops.load_balancing_loss`.
        expert_ids_MTK, output_expert_ids: see `SailVL2Model.forward`.

        Raises ValueError where image tokens and image features differ in number, or for arguments that exclude
        each other; nothing is ever truncated.
        """
        out = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            cu_seqlens=cu_seqlens,
            use_cache=use_cache,
            image_features=image_features,
            expert_ids_MTK=expert_ids_MTK,
            output_expert_ids=output_expert_ids,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_BLD = out.last_hidden_state[:, keep]
        if skip_logits is None:
            skip_logits = self.training
        logits = None if skip_logits and labels is not None else self.language_model.lm_head(hidden_BLD)
        loss = aux_loss = None
        if labels is not None:
            shifted_BL = next_tokens(labels, cu_seqlens)[:, keep]
            loss = self._answer_loss(hidden_BLD, logits, shifted_BL, num_items_in_batch)
        if output_router_logits is None:
            output_router_logits = getattr(self.config.text_config, "output_router_logits", False)
        if output_router_logits and out.counts_ME is not None:
            aux_loss = balance_loss(out.counts_ME, out.prob_sum_ME, out.num_tokens)
            if loss is not None:
                share = 1.0 if num_items_in_batch is None else (shifted_BL != IGNORE_INDEX).sum() / num_items_in_batch
                loss = loss + self.config.text_config.router_aux_loss_coef * share * aux_loss
        output = SailVL2Output(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=out.past_key_values,
            image_hidden_states=out.image_hidden_states,
            counts_ME=out.counts_ME,
            prob_sum_ME=out.prob_sum_ME,
            num_tokens=out.num_tokens,
            expert_ids_MTK=out.expert_ids_MTK,
        )
        return output.to_tuple() if return_dict is False else output

    def _answer_loss(
        self, hidden_BLD: Tensor, logits: Tensor | None, targets_BL: Tensor, num_items: Tensor | int | None
    ) -> Tensor:
        """Cross-entropy of the labeled positions; without logits where the head is a plain matrix."""
        head = self.language_model.lm_head
        if logits is None and not is_plain_linear(head):  # an adapter on it, say
            logits = head(hidden_BLD)
        if logits is not None:
            vocabulary = logits.shape[-1]
            return self.loss_function(
                logits=logits,
                labels=None,
                shift_labels=targets_BL,
                vocab_size=vocabulary,
                num_items_in_batch=num_items,
            )
        labeled = targets_BL != IGNORE_INDEX
        head_VD = cast(Tensor, head.weight)
        total = sail_ops.linear_cross_entropy(hidden_BLD[labeled], head_VD, targets_BL[labeled], reduction="sum")
        return total / (labeled.sum() if num_items is None else num_items)

    @property
    def model(self) -> SailVL2Model:
        """Everything but the head: tokens and pictures in, hidden states out."""
        return SailVL2Model(self)

    @property
    def base_model(self) -> SailVL2Model:
        """`model`."""
        return self.model

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Tiles [N, 3, image_size, image_size] -> image tokens [N, tokens_per_tile, D]."""
        return self.model.get_image_features(pixel_values)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.lm_head = new_embeddings

    def embed(self, input_ids: Tensor, features: Tensor | None) -> Tensor:
        """As `SailVL2Model.embed`."""
        return self.model.embed(input_ids, features)

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


def balance_loss(counts_ME: Tensor, prob_sum_ME: Tensor, num_tokens: Tensor) -> Tensor:
    """Mean over expert layers of `sail_ops.load_balancing_loss`: pooled, layers that collapsed would look balanced."""
    layers = zip(counts_ME, prob_sum_ME, strict=True)
    return torch.stack([sail_ops.load_balancing_loss(*layer, num_tokens) for layer in layers]).mean()


def is_plain_linear(module: nn.Module) -> bool:
    """Whether the module's output is its input times its weight, and nothing else."""
    return type(module) in (Linear, nn.Linear) and module.bias is None and not module._forward_hooks


def next_tokens(labels_BL: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The label that each position predicts: the next one, or -100 at the end of a sequence or packed sample."""
    following_BL = labels_BL.roll(-1, dims=1)
    following_BL[:, -1] = IGNORE_INDEX
    if cu_seqlens is not None:
        following_BL[:, cu_seqlens[1:].long() - 1] = IGNORE_INDEX
    return following_BL
