"""SAIL-VL2 as one Hugging Face model: SAIL-ViT, `mlp1`, Qwen3, and the head with its losses.

N tiles, B batch, L sequence, T = B*L tokens, D hidden, V vocabulary, M mixture-of-experts layers, E experts, K top-k,
S packed samples.
Single-device code; parallelism and engines live in `training`.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import ModelOutput

import sail_ops

from .attention import Pack
from .backbone import AttentionMask, Backbone
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

    aux_loss: fp32 scalar, the mean over mixture-of-experts layers of `sail_ops.load_balancing_loss`. The other fields
    behind the logits are `BackboneOutput`'s.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    image_hidden_states: Tensor | None = None
    counts_ME: Tensor | None = None
    prob_sum_ME: Tensor | None = None
    num_tokens: Tensor | None = None
    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
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

    @property
    def model(self) -> Backbone:
        """From inputs to hidden states: `model.model(...).last_hidden_state`."""
        return Backbone(self.config, self.vision_model, self.mlp1, self.language_model.model, self.training)

    @property
    def base_model(self) -> Backbone:
        return self.model

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: AttentionMask = None,
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
        pack: Pack | None = None,
        token_mask: Tensor | None = None,
        expert_ids_MTK: Tensor | None = None,
        output_router_logits: bool | None = None,
        output_expert_ids: bool = False,
        skip_logits: bool | None = None,
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
        pack in its place: sequences over the T tokens of all rows, which may look at other keys than their own
            (branches on one prefix). It needs position_ids.
        token_mask [B, L] bool, True where the routing statistics count; by default what attention_mask says.
        skip_logits: whether to leave logits out. The loss never makes more of them than a few rows at a time, so by
            default they are left out in training where there are labels, and made otherwise: without labels, and in
            evaluation.
        logits_to_keep: compute logits for the last n positions (0: all), or for these positions (int64 [n]). The loss
            is over the same positions.
        num_items_in_batch: divide the summed loss by this instead of by the number of labelled positions.
        output_router_logits (default: `text_config`'s): also `router_logits` and `aux_loss`; where there are labels,
            `text_config.router_aux_loss_coef` * aux_loss is added to the loss (with num_items_in_batch, in the
            proportion of this batch's labelled positions to it, so that accumulated batches add up to a mean).
        expert_ids_MTK [M, T, K] int: experts that each token is routed to, as output_expert_ids=True returned them;
            their weights are the router's.
        return_dict=False returns the fields that are not None as a tuple.

        Raises ValueError where image tokens and image features differ in number, or for arguments that exclude
        each other; nothing is ever truncated.
        """
        if skip_logits is None:
            skip_logits = self.training and labels is not None
        elif skip_logits and labels is None:
            raise ValueError("SailVL2: skip_logits needs labels: without logits and loss there is nothing to return")
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
            pack=pack,
            token_mask=token_mask,
            expert_ids_MTK=expert_ids_MTK,
            output_router_logits=output_router_logits,
            output_expert_ids=output_expert_ids,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_BLD = out.last_hidden_state[:, keep]
        aux_loss = None
        if out.router_logits:
            aux_loss = sail_ops.load_balancing_loss(out.counts_ME, out.prob_sum_ME, out.num_tokens).mean()
        loss = None
        if labels is not None:
            following_BL = next_tokens(labels, pack.cu_seqlens if pack else cu_seqlens)[:, keep]
            loss = self._loss(hidden_BLD, following_BL, num_items_in_batch, aux_loss)
        output = SailVL2Output(
            loss=loss,
            logits=None if skip_logits else self.language_model.lm_head(hidden_BLD),
            past_key_values=out.past_key_values,
            image_hidden_states=out.image_hidden_states,
            counts_ME=out.counts_ME,
            prob_sum_ME=out.prob_sum_ME,
            num_tokens=out.num_tokens,
            aux_loss=aux_loss,
            router_logits=out.router_logits,
            expert_ids_MTK=out.expert_ids_MTK,
        )
        return output.to_tuple() if return_dict is False else output

    def _loss(
        self,
        hidden_BLD: Tensor,
        labels_BL: Tensor,
        num_items_in_batch: Tensor | int | None,
        aux_loss: Tensor | None,
    ) -> Tensor:
        """Cross-entropy of what each position is to predict, and the balance loss."""
        labelled_BL = labels_BL != IGNORE_INDEX
        labels_N, hidden_ND = labels_BL[labelled_BL], hidden_BLD[labelled_BL]
        head: Any = self.language_model.lm_head
        reduction = "mean" if num_items_in_batch is None else "sum"
        if is_plain(head, hidden_ND):
            loss = sail_ops.linear_cross_entropy(hidden_ND, head.weight, labels_N, reduction=reduction)
        else:
            loss = F.cross_entropy(head(hidden_ND).float(), labels_N, reduction=reduction)
        share: Tensor | float = 1.0
        if num_items_in_batch is not None:
            items = torch.as_tensor(num_items_in_batch, device=loss.device)
            loss, share = loss / items, len(labels_N) / items
        if aux_loss is not None:
            loss = loss + self.config.text_config.router_aux_loss_coef * share * aux_loss
        return loss

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


def is_plain(head: nn.Module, hidden: Tensor) -> bool:
    """Whether head(hidden) is hidden @ weight^T and no more: no bias, adapter, hook, other forward or other dtype."""
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    if type(head) not in (nn.Linear, Linear) or head.bias is not None or "forward" in vars(head) or any(hooks):
        return False
    return head.weight.dtype == hidden.dtype or torch.is_autocast_enabled(hidden.device.type)


def next_tokens(labels_BL: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The label that each position predicts: the next one, or -100 at the end of a row or packed sample."""
    following_BL = labels_BL.roll(-1, dims=1)
    following_BL[:, -1] = IGNORE_INDEX
    if cu_seqlens is not None:
        following_BL.view(-1)[cu_seqlens[1:].long() - 1] = IGNORE_INDEX
    return following_BL
