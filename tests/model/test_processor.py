"""Tiling, normalization, image tokens, batches, and what happens to pictures that cannot be read."""

import base64
import copy
import pickle
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
from sail_model import processor as processing
from sail_model.chat import THINKING_SUFFIX
from sail_model.tiling import IMAGENET_MEAN, IMAGENET_STD, tile_grid


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


@pytest.mark.parametrize(
    ("images", "tiles"),
    [
        (picture(60, 40), [7]),
        (np.asarray(picture(60, 40)), [7]),
        (np.asarray(picture(60, 60))[..., 0], [1]),
        ([picture(60, 40), picture(60, 60)], [7, 1]),
        (np.zeros((2, 60, 60, 3), np.uint8), [1, 1]),
        ([[picture(60, 60)], None, [picture(60, 40), picture(60, 60)]], [1, 7, 1]),
        ([], []),
        (None, []),
    ],
    ids=["PIL", "array", "gray array", "two", "arrays", "by prompt", "none", "None"],
)
def test_one_picture_or_several(images: Any, tiles: list[int]) -> None:
    assert SailVL2ImageProcessor(TILE, max_dynamic_patch=6)(images)["num_tiles"] == tiles


def test_what_is_no_picture_is_named(processor: SailVL2Processor) -> None:
    for wrong in (torch.zeros(3, 60, 60), {"bytes": b"", "path": None}, 3):
        for images in (wrong, [wrong]):
            with pytest.raises(TypeError, match=f"got {type(wrong).__name__}"):
                processor(images=images, text="<image>")


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
        (None, [], "wanted text"),
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


def test_padding_to_a_length(processor: SailVL2Processor) -> None:
    texts = ["what", "what shape is it?"]
    longest = processor(text=texts)
    for side in ("left", "right"):
        out = processor(text=texts, padding="max_length", max_length=40, padding_side=side)
        assert out.input_ids.shape == out.attention_mask.shape == (2, 40)
        for got, mask, ids, real in zip(*out.values(), *longest.values(), strict=True):
            assert torch.equal(got[mask.bool()], ids[real.bool()])
    assert processor(text=texts, padding=False, return_tensors=None)["input_ids"] != longest.input_ids.tolist()
    with pytest.raises(ValueError, match="tokens, more than max_length=3"):
        processor(text=texts, padding="max_length", max_length=3)
    for wrong in (dict(padding="max_length"), dict(truncation=True)):
        with pytest.raises(ValueError, match="nothing is truncated; padding='max_length' needs a max_length"):
            processor(text=texts, **wrong)


def test_offsets_are_those_of_the_expanded_prompt(processor: SailVL2Processor) -> None:
    prompt, pictures = "a <image> b <image>", [picture(60, 60)] * 2
    out = processor(images=pictures, text=prompt, return_offsets_mapping=True, return_text_replacement_offsets=True)
    (expanded,) = processor.expand([prompt], [1, 1])
    tokens = [expanded[start:end] for start, end in out["offset_mapping"][0]]
    assert tokens == [processor.decode(token) for token in out["input_ids"][0]]
    for span in out["text_replacement_offsets"][0]:
        assert prompt[slice(*span["span"])] == "<image>"
        assert expanded[slice(*span["new_span"])] == processor.image_span(1)


def test_videos_are_refused(processor: SailVL2Processor) -> None:
    with pytest.raises(ValueError, match="not videos"):
        processor(text="x", videos=[picture(60, 60)])


def test_processor_round_trip(processor: SailVL2Processor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    tiny_config(False).save_pretrained(tmp_path)
    inputs = dict(images=picture(150, 100), text="<image>\nwhat shape is in the image?")
    wanted = processor(**inputs)
    loaded = [cls.from_pretrained(tmp_path) for cls in (SailVL2Processor, AutoProcessor)]
    for again in (*loaded, copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
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


# ---- messages -------------------------------------------------------------------------------------------------------
def chat(question: str, *answers: str, **part: Any) -> list[dict[str, Any]]:
    """A picture, if one is given, and a question; answers and further questions in turn."""
    pictures = [part | {"type": part.get("type", "image")}] if part else []
    turns: list[dict[str, Any]] = [{"role": "user", "content": [*pictures, {"type": "text", "text": question}]}]
    for answer in answers:
        turns += [{"role": "assistant", "content": answer}, {"role": "user", "content": "and now?"}]
    return turns[:-1] if answers else turns


def test_pictures_in_messages_by_any_name(processor: SailVL2Processor, tmp_path: Path) -> None:
    image = picture(60, 60)
    path = tmp_path / "p.png"
    image.save(path)
    encoded = base64.b64encode(path.read_bytes()).decode()
    url = f"data:image/png;base64,{encoded}"
    parts: list[dict[str, Any]] = [dict(image=image), dict(image=path), dict(path=str(path)), dict(url=str(path))]
    parts += [dict(image=np.asarray(image)), dict(image=path.read_bytes()), dict(base64=encoded), dict(base64=url)]
    parts += [dict(url=url), dict(image=url), dict(type="image_url", image_url={"url": url})]
    wanted = processor(images=image, text=processor.apply_chat_template(chat("what?", image=image)))
    for part in parts:
        messages = chat("what?", **part)
        before = str(messages)
        out = processor.apply_chat_template([messages], tokenize=True, return_dict=True)
        assert all(torch.equal(out[key], value) for key, value in wanted.items()), part.keys()
        assert str(messages) == before, "the user's messages are left as they are"
    with pytest.raises(CorruptImageError, match="cannot decode"):
        processor.apply_chat_template(chat("what?", base64=encoded[:40]), tokenize=True, return_dict=True)


def test_a_batch_of_conversations_is_each_of_them(processor: SailVL2Processor) -> None:
    conversations = [
        chat("what?", image=picture(150, 100)),
        chat("what shape?", "blue"),
        chat("a", image=picture(9, 9)),
    ]
    options = dict(tokenize=True, return_dict=True, add_generation_prompt=True)
    for side in ("left", "right"):
        batch = processor.apply_chat_template(conversations, **options, processor_kwargs=dict(padding_side=side))
        alone = [processor.apply_chat_template(one, **options) for one in conversations]
        for ids, mask, one in zip(batch["input_ids"], batch["attention_mask"], alone, strict=True):
            assert torch.equal(ids[mask.bool()], one["input_ids"][0])
        assert torch.equal(batch["pixel_values"], torch.cat([alone[0]["pixel_values"], alone[2]["pixel_values"]]))
        assert batch["attention_mask"][:, -1 if side == "left" else 0].all()


ANSWERS = ["a circle", "\nblue, 1.\n", ""]


@pytest.mark.skipif(not processing.MARKS_ANSWERS, reason="refused by the test below")
@pytest.mark.parametrize("side", ["left", "right"])
def test_assistant_masks_are_the_answers(side: str, processor: SailVL2Processor) -> None:
    """The tokens of each answer and its <|im_end|>, among pictures before, between and behind them."""
    many = chat("what?", *ANSWERS[:2], image=picture(150, 100))
    many += chat("what?", ANSWERS[2], image=picture(60, 60))
    conversations = [many, chat("what?"), chat("what?", ANSWERS[0], image=picture(60, 60))]
    out = processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        processor_kwargs=dict(padding_side=side),
    )
    masks = out["assistant_masks"]
    assert masks.shape == out["input_ids"].shape and isinstance(masks, torch.Tensor)
    marked = [processor.decode(ids[mask.bool()]) for ids, mask in zip(out["input_ids"], masks, strict=True)]
    assert marked == ["".join(answer + "<|im_end|>" for answer in ANSWERS), "", ANSWERS[0] + "<|im_end|>"]


def test_assistant_masks_are_refused_where_transformers_loses_answers(
    processor: SailVL2Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processing, "MARKS_ANSWERS", False)
    with pytest.raises(ValueError, match=r"transformers >= 5\.18"):
        processor.apply_chat_template(
            chat("what?", "blue"), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )


def test_from_messages_to_an_answer(processor: SailVL2Processor) -> None:
    """The documented way: chat template, model inputs, generate, decode."""
    config = tiny_config(True, vocab_size=len(processor.tokenizer), eos_token_id=processor.tokenizer.eos_token_id)
    config.image_token_id = processor.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    model = SailVL2ForConditionalGeneration(config).eval()
    parts = [{"type": "image", "image": picture(150, 100)}, {"type": "text", "text": "what shape?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    stop = dict(stop_strings=["\n\n\n\n"], tokenizer=processor.tokenizer)
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False, **stop)
    assert inputs["input_ids"].shape[1] < ids.shape[1] <= inputs["input_ids"].shape[1] + 3
    assert isinstance(processor.decode(ids[0, inputs["input_ids"].shape[1] :]), str)
