"""Tiling, normalization, image tokens, batches, and what happens to pictures that cannot be read."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_model import TILE, tiny_config
from transformers import AutoProcessor, Qwen2Tokenizer
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from sail_model import (
    CorruptImageError,
    SailVL2ForConditionalGeneration,
    SailVL2ImageProcessor,
    SailVL2Processor,
    train_tokenizer,
)
from sail_model.chat import THINKING_SUFFIX
from sail_model.images import IMAGENET_MEAN, IMAGENET_STD, load_image, tile_grid


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2Tokenizer:
    return train_tokenizer(["what shape is in the image?"], 291)


@pytest.fixture
def processor(tokenizer: Qwen2Tokenizer) -> SailVL2Processor:
    return SailVL2Processor(SailVL2ImageProcessor(TILE, max_dynamic_patch=4), tokenizer, tokens_per_tile=4)


# ---- pictures -------------------------------------------------------------------------------------------------------
@settings(deadline=None)  # a busy machine is no fault
@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([1, 6, 10, 12, 24]))
def test_grid_is_that_of_transformers(width: int, height: int, limit: int) -> None:
    wanted = get_optimal_tiled_canvas((height, width), (448, 448), 1, limit)
    assert tile_grid(width, height, 448, limit) == tuple(wanted)


@pytest.mark.parametrize(
    ("width", "height", "grid", "tiles"),
    [(448, 448, (1, 1), 1), (640, 480, (3, 2), 7), (1920, 1080, (4, 2), 9), (2000, 500, (4, 1), 5)],
)
def test_released_tile_counts(width: int, height: int, grid: tuple[int, int], tiles: int) -> None:
    assert tile_grid(width, height, 448, 10) == grid
    assert SailVL2ImageProcessor().num_tiles(width, height) == tiles


def test_tiles_are_cut_row_by_row_and_the_thumbnail_is_last() -> None:
    image = picture(300, 200)
    out = SailVL2ImageProcessor(TILE, max_dynamic_patch=6)([image], return_tensors="pt")
    assert out["num_tiles"] == [7]
    canvas = image.resize((3 * TILE, 2 * TILE))
    crops = [canvas.crop((x * TILE, y * TILE, (x + 1) * TILE, (y + 1) * TILE)) for y in range(2) for x in range(3)]
    wanted = np.stack([np.asarray(crop) for crop in [*crops, image.resize((TILE, TILE))]])
    assert out["pixel_values"].shape == (7, 3, TILE, TILE)
    assert out["pixel_values"].dtype == torch.float32
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    restored = (out["pixel_values"].permute(0, 2, 3, 1) * std + mean) * 255
    assert torch.equal(restored.round().byte(), torch.from_numpy(wanted))


def test_one_tile_has_no_thumbnail() -> None:
    out = SailVL2ImageProcessor(TILE)([picture(60, 60)], return_tensors="pt")
    assert out["num_tiles"] == [1] and out["pixel_values"].shape == (1, 3, TILE, TILE)


def test_max_dynamic_patch_of_a_call() -> None:
    processor = SailVL2ImageProcessor(TILE)
    assert processor([picture(300, 200)], max_dynamic_patch=1)["num_tiles"] == [1]
    assert processor.num_tiles(300, 200, max_dynamic_patch=2) == 3
    with pytest.raises(ValueError, match="at least 1, got 0"):
        processor([picture(300, 200)], max_dynamic_patch=0)


def test_every_source_gives_the_same_picture(tmp_path: Path) -> None:
    image = picture(30, 20)
    path = tmp_path / "p.png"
    image.save(path)
    for source in (image, np.asarray(image), path, str(path), path.read_bytes()):
        assert np.array_equal(np.asarray(load_image(source)), np.asarray(image))
    gray = load_image(np.asarray(image)[..., 0])
    assert gray.mode == "RGB" and gray.size == (30, 20)
    assert load_image(image.convert("P")).mode == "RGB"
    with pytest.raises(ValueError, match="float64"):
        load_image(np.zeros((4, 4, 3)))


def corrupt(kind: str) -> bytes:
    buffer = io.BytesIO()
    picture(64, 64).save(buffer, "JPEG" if kind == "half of a JPEG" else "PNG")
    whole = buffer.getvalue()
    if kind == "flipped bytes":
        return whole[:100] + bytes(255 - byte for byte in whole[100:400]) + whole[400:]
    return {"empty": b"", "text": b"not a picture", "no header": whole[8:]}.get(kind, whole[: len(whole) // 2])


@pytest.mark.parametrize("kind", ["empty", "text", "no header", "half of a JPEG", "half of a PNG", "flipped bytes"])
def test_corrupt_pictures_raise_their_own_error(kind: str, tmp_path: Path, processor: SailVL2Processor) -> None:
    data = corrupt(kind)
    path = tmp_path / "picture"
    path.write_bytes(data)
    for source in (data, path, str(path)):
        with pytest.raises(CorruptImageError, match="cannot decode"):
            processor(images=[source], text="<image>")
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "missing.png")


# ---- text and pictures ----------------------------------------------------------------------------------------------
def test_image_tokens_and_left_padding(processor: SailVL2Processor) -> None:
    texts = ["<image>\nhi", "a <image> b <image>", "no picture at all"]
    images = [[picture(60, 60)], [picture(150, 100), picture(60, 60)], []]
    out = processor(images=images, text=texts)
    image, start, end, pad = (
        processor.tokenizer.convert_tokens_to_ids(t) for t in ("<IMG_CONTEXT>", "<img>", "</img>", "<|endoftext|>")
    )
    tiles = [1, processor.image_processor.num_tiles(150, 100) + 1, 0]
    assert (out.input_ids == image).sum(1).tolist() == [4 * n for n in tiles]
    assert (out.input_ids == start).sum(1).tolist() == (out.input_ids == end).sum(1).tolist() == [1, 2, 0]
    assert out.pixel_values.shape == (sum(tiles), 3, TILE, TILE)
    assert torch.equal(out.attention_mask, (out.input_ids != pad).long())
    assert (out.attention_mask.diff(dim=1) >= 0).all(), "padding is on the left"
    right = processor(images=images, text=texts, padding_side="right")
    assert (right.attention_mask.diff(dim=1) <= 0).all()
    # one by one, flat or nested, it is the same
    flat = processor(images=[image for row in images for image in row], text=texts)
    assert torch.equal(flat.input_ids, out.input_ids) and torch.equal(flat.pixel_values, out.pixel_values)
    alone = processor(images=picture(60, 60), text=texts[0])
    assert torch.equal(alone.input_ids[0], out.input_ids[0, -alone.input_ids.shape[1] :])
    assert "pixel_values" not in processor(text="no picture")


def test_token_budget(processor: SailVL2Processor) -> None:
    for width, height in ((60, 60), (150, 100), (100, 200)):
        ids = processor(images=picture(width, height), text="<image>").input_ids[0]
        assert processor.num_image_tokens(width, height) == len(ids)
    released = SailVL2Processor(SailVL2ImageProcessor(), processor.tokenizer)
    assert released.num_image_tokens(1920, 1080) == 2304 + 2


@pytest.mark.parametrize(
    ("images", "text", "message"),
    [
        (1, "none", r"0 <image> placeholders, but come with 1"),
        (1, "<image><image>", r"2 <image> placeholders, but come with 1"),
        (None, "<image>", r"1 <image> placeholders, but come with 0"),
        (2, ["<image>", "none"], r"1 <image> placeholders, but come with 2"),
        (1, None, "wanted text"),
    ],
)
def test_placeholders_and_pictures_must_agree(
    images: int | None, text: Any, message: str, processor: SailVL2Processor
) -> None:
    pictures = None if images is None else [picture(60, 60)] * images
    with pytest.raises(ValueError, match=message):
        processor(images=pictures, text=text)


def test_nested_pictures_belong_to_their_prompts(processor: SailVL2Processor) -> None:
    with pytest.raises(ValueError, match=r"hold \[1, 1\] <image> placeholders, but come with \[2, 0\]"):
        processor(images=[[picture(60, 60)] * 2, []], text=["<image>", "<image>"])


def test_nothing_is_truncated(processor: SailVL2Processor) -> None:
    prompt = processor(images=picture(60, 60), text="<image> a")
    length = prompt.input_ids.shape[1]
    assert processor(images=picture(60, 60), text="<image> a", max_length=length).input_ids.shape[1] == length
    with pytest.raises(ValueError, match=f"{length} tokens, more than max_length={length - 1}; it is not truncated"):
        processor(images=picture(60, 60), text="<image> a", max_length=length - 1)


def test_videos_are_refused(processor: SailVL2Processor) -> None:
    with pytest.raises(ValueError, match="not videos"):
        processor(text="x", videos=[picture(60, 60)])


def test_processor_round_trip(processor: SailVL2Processor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    tiny_config(False).save_pretrained(tmp_path)
    inputs = dict(images=picture(150, 100), text="<image>\nwhat shape is in the image?")
    wanted = processor(**inputs)
    for again in (SailVL2Processor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert isinstance(again, SailVL2Processor)
        assert again.tokens_per_tile == 4
        got = again(**inputs)
        assert all(torch.equal(got[key], value) for key, value in wanted.items())


def test_thinking_is_asked_for_through_the_processor_too(processor: SailVL2Processor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    parts = [{"type": "image", "image": picture(60, 60)}, {"type": "text", "text": "what shape?"}]
    messages = [{"role": "user", "content": parts}]
    for one in (processor, SailVL2Processor.from_pretrained(tmp_path)):
        plain, asked = (
            one.apply_chat_template(messages, tokenize=True, return_dict=True, thinking=thinking)
            for thinking in (False, True)
        )
        assert THINKING_SUFFIX not in processor.decode(plain["input_ids"][0])
        assert processor.decode(asked["input_ids"][0]).endswith(f"what shape?{THINKING_SUFFIX}<|im_end|>")
        assert torch.equal(plain["pixel_values"], asked["pixel_values"])


def test_from_messages_to_an_answer(processor: SailVL2Processor) -> None:
    """The documented way: chat template, model inputs, generate, decode."""
    config = tiny_config(True, vocab_size=len(processor.tokenizer), eos_token_id=processor.tokenizer.eos_token_id)
    config.image_token_id = processor.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    model = SailVL2ForConditionalGeneration(config).eval()
    parts = [{"type": "image", "image": picture(150, 100)}, {"type": "text", "text": "what shape?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert inputs["input_ids"].shape[1] < ids.shape[1] <= inputs["input_ids"].shape[1] + 3
    assert isinstance(processor.decode(ids[0, inputs["input_ids"].shape[1] :]), str)
