"""SAIL-VL2 of transformers' own modules: InternVL with an AIMv2 encoder and Qwen3 or Qwen3-MoE, on our weights.

`StockSupervised` trains it through the same engine, on batches of the two kinds that such a model takes: padded rows of
one sample each, or our own packs under a mask. B rows, L tokens of the longest of them.
"""

import copy
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Aimv2VisionConfig, InternVLConfig, InternVLForConditionalGeneration

from sail_model import SailVL2Config
from training.data.batch import Batch, collate, lay_out
from training.data.sample import Sample
from training.objectives.supervised import Objective

State = dict[str, Tensor]

RENAMES = [
    (r"^vision_model\.preprocessor\.patchifier\.proj\.", "model.vision_tower.embeddings.patch_embed."),
    (r"^vision_model\.preprocessor\.patchifier\.norm\.", "model.vision_tower.embeddings.rms_norm."),
    (r"^vision_model\.preprocessor\.pos_embed$", "model.vision_tower.embeddings.position_embedding.weight"),
    (r"^vision_model\.trunk\.post_trunk_norm\.", "model.vision_tower.rms_norm."),
    (r"^vision_model\.trunk\.blocks\.(\d+)\.", r"model.vision_tower.encoder.layers.\1."),
    (r"\.attn\.proj\.", ".attention.out_proj."),
    (r"\.mlp\.fc1\.", ".ffn.gate_proj."),
    (r"\.mlp\.fc3\.", ".ffn.up_proj."),
    (r"\.mlp\.fc2\.", ".ffn.down_proj."),
    (r"\.norm_([12])\.", r".rms_norm\1."),
    (r"^mlp1\.0\.", "model.multi_modal_projector.layer_norm."),
    (r"^mlp1\.1\.", "model.multi_modal_projector.linear_1."),
    (r"^mlp1\.3\.", "model.multi_modal_projector.linear_2."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
]


def stock_key(key: str) -> str:
    """transformers' name of one of our weights."""
    for pattern, replacement in RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def to_stock(state: State) -> State:
    """Our names and layouts -> transformers'."""
    mapped = {}
    for key, value in state.items():
        if key.endswith("attn.qkv.weight"):
            stem = stock_key(key.removesuffix("attn.qkv.weight"))
            for name, part in zip("qkv", value.chunk(3), strict=True):
                mapped[f"{stem}attention.{name}_proj.weight"] = part
        else:
            mapped[stock_key(key)] = value[0] if key.endswith("pos_embed") else value
    return mapped


def stock_model(config: SailVL2Config, state: State) -> nn.Module:
    """transformers' model with copies of our weights, and its defaults: SDPA, `grouped_mm` experts."""
    vision = config.vision_config
    fields = "hidden_size intermediate_size num_hidden_layers num_attention_heads image_size patch_size rms_norm_eps"
    model = InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=Aimv2VisionConfig(use_head=False, **{name: getattr(vision, name) for name in fields.split()}),
            text_config=copy.deepcopy(config.text_config),
            image_token_id=config.image_token_id,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            tie_word_embeddings=config.tie_word_embeddings,
        )
    )
    model.load_state_dict(to_stock(state), strict=True)
    # its pixel shuffle views features that its patch embedding leaves transposed
    model.model.vision_tower.embeddings.register_forward_hook(lambda module, args, output: output.contiguous())
    return model


@dataclass
class StockBatch:
    """What an engine asks of a batch, and the arguments of transformers' model."""

    inputs: State
    labels: int  # positions that are learned
    tokens: int  # without padding

    def to(self, device: torch.device, dtype: torch.dtype) -> "StockBatch":
        """On `device`, pixels in `dtype`."""
        moved = {name: value.to(device) for name, value in self.inputs.items()}
        return replace(self, inputs=moved | {"pixel_values": moved["pixel_values"].to(dtype)})


class StockSupervised(nn.Module):
    """`training.objectives.Supervised` of a stock model: the loss that its forward makes, summed.

    It reports no routing statistics, so its step has no load-balancing loss: a little less to do than ours.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: StockBatch) -> Objective:
        """sum over labels of -log softmax(logits of the position before)[label]."""
        loss = self.model(**batch.inputs, num_items_in_batch=1, use_cache=False).loss
        none = torch.zeros(0, 0, device=loss.device)
        return Objective(loss, none, none)


def implementations(objective: nn.Module) -> dict[str, str]:
    """Which of its ways transformers has chosen for a `StockSupervised`."""
    config: Any = objective.get_submodule("model.model.language_model").config
    experts = {"experts": config._experts_implementation} if config.model_type == "qwen3_moe" else {}
    return {"attention": config._attn_implementation, **experts}


def work(batch: Batch | StockBatch) -> dict[str, int]:
    """What goes through a step, padding among its positions."""
    if isinstance(batch, Batch):
        ids_BL, pixels = batch.input_ids_BL, batch.pixels
    else:
        ids_BL, pixels = batch.inputs["input_ids"], batch.inputs["pixel_values"]
    counted = {"rows": len(ids_BL), "positions": ids_BL.numel(), "tiles": len(pixels)}
    return counted | {"tokens": batch.tokens, "labels": batch.labels}


def question_rows(batch: Batch, tile_tokens: int, image_token: int, pad_id: int) -> Batch:
    """The same answers as a trainer without branches has them: a question a row, its picture encoded again."""
    rows, start = [], 0
    for ids, labels, sample, branch in zip(
        *(t.numpy() for t in (batch.input_ids_BL, batch.labels_BL, batch.sample_BL, batch.branch_BL)), strict=True
    ):
        for number in range(1, sample.max() + 1):
            own, tiles = sample == number, int((ids[sample == number] == image_token).sum()) // tile_tokens
            for part in range(1, branch[own].max() + 1) or (0,):
                taken = own & ((branch == 0) | (branch == part))
                question = Sample(ids[taken].astype("int32"), labels[taken].astype("int32"))
                rows.append(lay_out([question], batch.pixels[start : start + tiles]))
            start += tiles
    return collate(rows, pad_id)


def padded(batch: Batch) -> StockBatch:
    """Rows of one sample each, and which of their positions are tokens."""
    return _stock_batch(batch, {"attention_mask": batch.token_mask().long()})


def packed(batch: Batch) -> StockBatch:
    """The same rows: positions as they are, and a mask [B, 1, L, L] that is True where a query may look."""
    sample_BL, branch_BL = batch.sample_BL, batch.branch_BL
    same_sample = sample_BL[:, :, None] == sample_BL[:, None]
    same_branch = (branch_BL[:, None] == 0) | (branch_BL[:, :, None] == branch_BL[:, None])
    mask = (same_sample & same_branch).tril()[:, None]
    return _stock_batch(batch, {"attention_mask": mask, "position_ids": batch.position_ids_BL})


def _stock_batch(batch: Batch, more: State) -> StockBatch:
    inputs = {"input_ids": batch.input_ids_BL, "pixel_values": batch.pixels, "labels": batch.labels_BL, **more}
    return StockBatch(inputs, batch.labels, batch.tokens)
