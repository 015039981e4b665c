"""From a recipe to what the trainer needs: processor, model, and the samples of its data."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import sail_model
from sail_model import (
    SailVL2Config,
    SailVL2ForConditionalGeneration,
    SailVL2ImageProcessor,
    SailVL2Processor,
    load_tokenizer,
    train_tokenizer,
)
from sail_model.config import PRESETS
from sail_model.tokenizer import IMAGE_CONTEXT
from training import checkpoint
from training.data.conversation import Conversation, Text
from training.data.encode import EncodedMixture
from training.data.loader import StreamLoader
from training.data.mixture import open_data, usable
from training.errors import InputError
from training.recipes import PARTS, Recipe

# vision_config, text_config and downsample_ratio of `SailVL2Config`; vocabulary and token ids come with the tokenizer
MODELS: dict[str, dict[str, Any]] = {
    "demo": {
        "vision_config": {
            "image_size": 64,
            "patch_size": 8,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
        },
        "text_config": {
            "hidden_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            # 0.02 leaves a network this narrow almost linear at first
            "initializer_range": 0.05,
        },
    },
}
VOCABULARY, VOCABULARY_RECORDS = 512, 20_000


@dataclass
class Parts:
    """The model and its processor, before an engine takes them."""

    processor: SailVL2Processor
    model: SailVL2ForConditionalGeneration

    @property
    def pad_id(self) -> int:
        """Token that fills streams."""
        return int(self.processor.tokenizer.pad_token_id)


def assemble(recipe: Recipe, start: checkpoint.Start | None = None) -> Parts:
    """Processor and model of a recipe, equal on every rank.

    With a checkpoint to go on from, processor and configuration are its own, and the engine brings the weights:
    trained anew on a file that somebody has edited, a tokenizer's same ids would mean other text. Raises InputError
    for a model that there is not.
    """
    torch.manual_seed(recipe.seed)
    if start is not None:
        folder = start.folder / checkpoint.MODEL
        with checkpoint.reading(start.folder):
            model = SailVL2ForConditionalGeneration(SailVL2Config.from_pretrained(folder))
            return Parts(SailVL2Processor.from_pretrained(folder), model)
    if recipe.vision:
        try:
            model, processor = sail_model.assemble(recipe.vision, recipe.language, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise InputError(f"Recipe: vision, language: {error}") from error
        return Parts(processor, model)
    if recipe.model in MODELS:
        processor = build_processor(recipe.model, usable(open_data(recipe.data)))
        return Parts(processor, SailVL2ForConditionalGeneration(build_config(recipe.model, processor)))
    if recipe.model in PRESETS:
        config = SailVL2Config.from_preset(recipe.model)
        pictures = SailVL2ImageProcessor(image_size=config.vision_config.image_size)
        processor = SailVL2Processor(pictures, load_tokenizer(), tokens_per_tile=config.tokens_per_tile)
        return Parts(processor, SailVL2ForConditionalGeneration(config))
    folder = export_folder(recipe.model)
    model = SailVL2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return Parts(SailVL2Processor.from_pretrained(folder), model)


def export_folder(name: str) -> Path:
    """The folder with config.json that `name` means: itself, or the model of a run. Raises InputError."""
    for folder in (Path(name), Path(name) / checkpoint.MODEL):
        if (folder / "config.json").is_file():
            return folder
    sizes = ", ".join([*MODELS, *PRESETS])
    raise InputError(f"Recipe: model: got {name!r}, want one of {sizes}, or a folder with a config.json or a model/")


def open_samples(recipe: Recipe, processor: SailVL2Processor, data: str | None = None) -> EncodedMixture:
    """The recipe's data, or other `data`, as samples of at most a stream's tokens."""
    return EncodedMixture(
        open_data(data or recipe.data), processor, capacity=recipe.stream_length, max_tiles=recipe.max_tiles or None
    )


def open_loader(samples: EncodedMixture, recipe: Recipe, pad_id: int, *, rank: int = 0, world: int = 1) -> StreamLoader:
    """The recipe's micro-batches of `samples` for one of `world` ranks that share the data."""
    return StreamLoader(
        samples,
        streams=recipe.streams,
        micro_batches=recipe.micro_batches,
        rank=rank,
        world=world,
        capacity=recipe.stream_length,
        seed=recipe.seed,
        candidates=recipe.candidates,
        workers=recipe.workers,
        picture_balance=recipe.picture_balance,
        pad_id=pad_id,
        blank=recipe.blank_pictures,
    )


def freeze(model: SailVL2ForConditionalGeneration, recipe: Recipe) -> None:
    """Only the parameters of `recipe.parts` get gradients."""
    trained = tuple(PARTS[part] for part in recipe.parts)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))


def build_processor(model: str, records: Iterable[Conversation]) -> SailVL2Processor:
    """A byte-level BPE trained on the text of the first records, and an image processor of one tile a picture."""
    vision = MODELS[model]["vision_config"]
    texts = {"user", "assistant"}
    for record in islice(records, VOCABULARY_RECORDS):
        turns = [*record.turns, *(turn for branch in record.branches for turn in branch)]
        texts |= {part.text for turn in turns for part in turn.parts if isinstance(part, Text)}
    side = round(vision["image_size"] / vision["patch_size"] * MODELS[model].get("downsample_ratio", 0.5))
    pictures = SailVL2ImageProcessor(image_size=vision["image_size"], max_dynamic_patch=1)
    return SailVL2Processor(pictures, train_tokenizer(sorted(texts), VOCABULARY), tokens_per_tile=side**2)


def build_config(model: str, processor: SailVL2Processor) -> SailVL2Config:
    """The configuration of `MODELS[model]` for this tokenizer."""
    tokenizer = processor.tokenizer
    shape = MODELS[model]
    text = {
        "model_type": "qwen3_moe",
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "max_position_embeddings": 4096,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
        **shape["text_config"],
    }
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT)
    return SailVL2Config(**{**shape, "text_config": text, "image_token_id": image_token})
