"""From a recipe to what the trainer needs: tokenizer, processor, model, samples, reader."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sail_model import (
    SailVL2Config,
    SailVL2ForConditionalGeneration,
    SailVL2ImageProcessor,
    SailVL2Processor,
    train_tokenizer,
)
from sail_model.tokenizer import IMAGE_CONTEXT, IMAGE_END
from training import checkpoint
from training.errors import InputError
from training.packing import IGNORE, Branch, Sample, split_to_fit
from training.recipes import Recipe
from training.records import PictureReader, Record, Split, easy_vqa, fingerprint, jsonl_records

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
VOCABULARY = 512


@dataclass
class Parts:
    """Everything a recipe stands for, before an engine takes the model."""

    processor: SailVL2Processor
    model: SailVL2ForConditionalGeneration
    samples: list[Sample[Path]]
    reader: PictureReader
    data: dict[str, Any]  # the fingerprint of all records, held-out ones too

    @property
    def pad_id(self) -> int:
        """Token that fills streams."""
        return int(self.processor.tokenizer.pad_token_id)


def assemble(recipe: Recipe, start: Path | None = None) -> Parts:
    """Data, tokenizer, and a model with random weights; equal on every rank.

    With a checkpoint to go on from, tokenizer, image processor and configuration are its own: trained anew on a file
    that somebody has edited, the same ids would mean other text. Raises InputError for unknown names, and where the
    data is not what the checkpoint was trained on.
    """
    records, data = load_records(recipe.data, "train"), fingerprint(all_records(recipe.data))
    if start is None:
        if recipe.model not in MODELS:
            raise InputError(f"Recipe: model: got {recipe.model!r}, want one of {', '.join(MODELS)}")
        processor = build_processor(recipe.model, records)
        config = build_config(recipe.model, processor)
    else:
        checkpoint.check_data(start, recipe.data, data)
        processor = SailVL2Processor.from_pretrained(start / checkpoint.MODEL)
        config = SailVL2Config.from_pretrained(start / checkpoint.MODEL)
    torch.manual_seed(recipe.seed)
    model = SailVL2ForConditionalGeneration(config)
    return Parts(processor, model, encode(records, processor, recipe.stream_length), picture_reader(processor), data)


def all_records(data: str) -> list[Record]:
    """The records of a source, those to train on and those to test on."""
    return [*easy_vqa("train"), *easy_vqa("test")] if data == "easy_vqa" else jsonl_records(Path(data))


def load_records(data: str, split: Split) -> list[Record]:
    """`easy_vqa`'s split; of a .jsonl file, its first nine tenths to train on and the rest to test.

    Raises InputError where a file has too few records to hold one out.
    """
    if data == "easy_vqa":
        return easy_vqa(split)
    records = all_records(data)
    if split == "test" and len(records) < 2:
        raise InputError(f"{data}: got {len(records)} record, want at least 2: one to train on, one to test")
    edge = max(1, len(records) * 9 // 10)
    return records[:edge] if split == "train" else records[edge:]


def build_processor(model: str, records: Sequence[Record]) -> SailVL2Processor:
    """A byte-level BPE trained on the questions and answers, and an image processor of one tile a picture."""
    vision = MODELS[model]["vision_config"]
    texts = sorted({text for record in records for pair in record.questions for text in pair} | {"user", "assistant"})
    side = round(vision["image_size"] / vision["patch_size"] * MODELS[model].get("downsample_ratio", 0.5))
    pictures = SailVL2ImageProcessor(image_size=vision["image_size"], max_dynamic_patch=1)
    return SailVL2Processor(pictures, train_tokenizer(texts, VOCABULARY), tokens_per_tile=side**2)


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


def encode(records: Sequence[Record], processor: SailVL2Processor, capacity: int) -> list[Sample[Path]]:
    """The records as samples of at most `capacity` tokens, in the model's own chat format, without a system turn.

    Raises InputError for a question that does not fit: nothing is ever truncated.
    """
    samples = []
    for record in records:
        try:
            samples += split_to_fit(encode_one(record, processor), capacity)
        except ValueError as error:
            raise InputError(f"{record.picture}: {error}; want a larger --stream-length") from error
    return samples


def encode_one(record: Record, processor: SailVL2Processor) -> Sample[Path]:
    """The picture's tokens once, then a branch for each question; only answers are learned, with their end token."""
    prefix: tuple[int, ...] = ()
    branches = []
    for question, answer in record.questions:
        asked, answered = prompt_ids(question, processor), answer_ids(answer, processor)
        start = asked.index(processor.tokenizer.convert_tokens_to_ids(IMAGE_END)) + 1
        prefix, rest = asked[:start], asked[start:]
        branches.append(Branch(rest + answered, (IGNORE,) * len(rest) + answered))
    return Sample(record.picture, prefix, tuple(branches))


def chat(question: str) -> list[dict[str, Any]]:
    """Messages that show one picture and ask `question`, without a system turn."""
    user = [{"type": "image"}, {"type": "text", "text": question}]
    return [{"role": "system", "content": ""}, {"role": "user", "content": user}]


@cache
def prompt_ids(question: str, processor: SailVL2Processor) -> tuple[int, ...]:
    """Token ids of picture and question up to where the answer begins: those that `generate` is given."""
    prompt = processor.apply_chat_template(chat(question), add_generation_prompt=True)
    (expanded,) = processor.expand([prompt], [1])
    return tuple(processor.tokenizer(expanded, add_special_tokens=False)["input_ids"])


@cache
def answer_ids(answer: str, processor: SailVL2Processor) -> tuple[int, ...]:
    """Token ids of an answer and of the end of the turn."""
    return tuple(processor.tokenizer(answer + processor.tokenizer.eos_token, add_special_tokens=False)["input_ids"])


def picture_reader(processor: SailVL2Processor) -> PictureReader:
    """Pictures prepared as the processor prepares them for `generate`."""

    def prepare(picture: Image.Image) -> Tensor:
        return processor.image_processor([picture], return_tensors="pt")["pixel_values"][0]

    return PictureReader(prepare)
