"""A conversation's tokens are those of the model's own chat format; learned are the assistant's words and turn ends."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sail_model import SailVL2ImageProcessor, SailVL2Processor, train_tokenizer
from sail_model.images import CorruptImageError
from training.data.conversation import BadRecord, Conversation, Picture, Text, Turn
from training.data.encode import EncodedMixture, Encoder, split_to_fit
from training.data.formats import conversation_of
from training.data.mixture import Mixture
from training.data.sample import IGNORE, Branch, Sample

TILE = 32


@pytest.fixture(scope="module")
def processor() -> SailVL2Processor:
    texts = ["what color is it?", "is it red or blue?", "yes", "no", "user", "assistant", "system", "be brief"]
    return SailVL2Processor(SailVL2ImageProcessor(TILE, 4), train_tokenizer(texts, 340), tokens_per_tile=4)


def picture(width: int, height: int, orientation: int = 1, kind: str = "JPEG") -> bytes:
    image, exif, out = Image.linear_gradient("L").resize((width, height)).convert("RGB"), Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(out, kind, exif=exif)
    return out.getvalue()


SQUARE, WIDE = picture(40, 40), picture(64, 32)


def messages(*turns: tuple[str, Any], system: str | None = "") -> list[dict[str, Any]]:
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": role, "content": content} for role, content in turns]


CASES = {
    "text": [("user", "is it red?"), ("assistant", "yes")],
    "turns": [("user", "is it red?"), ("assistant", "no"), ("user", "  what\ncolor?\n"), ("assistant", "blue\n\n1")],
    "picture": [("user", [{"type": "image"}, {"type": "text", "text": "what color is it?"}]), ("assistant", "red")],
    "pictures": [
        ("user", [{"type": "image"}, {"type": "text", "text": "or"}, {"type": "image"}, {"type": "text", "text": "?"}]),
        ("assistant", "no"),
        ("user", [{"type": "text", "text": "and"}, {"type": "image"}]),
        ("assistant", "yes"),
    ],
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("system", ["", "be brief"])
def test_tokens_are_those_of_the_processor(name: str, system: str, processor: SailVL2Processor) -> None:
    shown = [SQUARE, WIDE, SQUARE]
    asked = messages(*CASES[name], system=system)
    pictures = shown[: sum(part["type"] == "image" for _, c in CASES[name] if isinstance(c, list) for part in c)]
    wanted = processor(images=pictures or None, text=processor.apply_chat_template(asked), return_tensors=None)
    sample = Encoder(processor).encode(conversation_of({"messages": asked}, None, "here", pictures))
    if not system:
        without = conversation_of({"messages": asked[1:]}, None, "here", pictures)
        assert Encoder(processor).encode(without).ids.tolist() == sample.ids.tolist()
    assert sample.ids.tolist() == wanted["input_ids"][0]
    assert [slot.tiles for slot in sample.pictures] == [1, 3, 1][: len(pictures)]
    learned = processor.tokenizer.decode(sample.ids[sample.labels != IGNORE])
    assert learned == "".join(f"{content}<|im_end|>" for role, content in CASES[name] if role == "assistant")
    assert (sample.ids[sample.labels != IGNORE] == sample.labels[sample.labels != IGNORE]).all()


def test_an_answer_follows_the_tokens_that_generation_is_prompted_with() -> None:
    """Also where its first line break would be one token with the prompt's last."""
    tokenizer = train_tokenizer(["a\n\n", "b\n\n", "c\n\n"], 292)
    assert len(tokenizer("\n\n")["input_ids"]) == 1, "the case that the test is about"
    processor = SailVL2Processor(SailVL2ImageProcessor(TILE, 4), tokenizer, tokens_per_tile=4)
    prompt = processor.apply_chat_template(messages(("user", "q")), add_generation_prompt=True)
    for answer in ("a", "\na", "\n\na"):
        sample = Encoder(processor).encode(
            conversation_of({"messages": messages(("user", "q"), ("assistant", answer))}, None, "")
        )
        learned = tokenizer(f"{answer}<|im_end|>")["input_ids"]
        assert sample.ids.tolist() == tokenizer(prompt)["input_ids"] + learned
        assert sample.labels[sample.labels != IGNORE].tolist() == learned


def test_long_texts_do_not_fill_memory(processor: SailVL2Processor) -> None:
    encoder = Encoder(processor)
    for words in ("yes", "yes " * 100):
        sample = encoder.encode(Conversation((Turn("assistant", (Text(words),), learn=True),)))
        assert processor.tokenizer.decode(sample.ids).endswith(f"{words}<|im_end|>")
    assert encoder._cached.cache_info().currsize == 2, "a head and a short answer"


def test_what_is_not_to_be_learned_is_the_same_tokens(processor: SailVL2Processor) -> None:
    turns = (Turn("user", (Text("is it red?"),)), Turn("assistant", (Text("yes"),), learn=True))
    unlearned = Turn("assistant", (Text("yes"),))
    both = Encoder(processor).encode(Conversation((*turns, *turns)))
    one = Encoder(processor).encode(Conversation((turns[0], unlearned, *turns)))
    assert one.ids.tolist() == both.ids.tolist()
    assert (one.labels != IGNORE).sum() * 2 == (both.labels != IGNORE).sum()


def questions(*pairs: tuple[str, str]) -> Conversation:
    return conversation_of({"questions": [list(pair) for pair in pairs]}, None, "here", [SQUARE])


def test_branches_share_what_comes_before_them(processor: SailVL2Processor) -> None:
    encoder = Encoder(processor)
    asked = [("is it red?", "yes"), ("is it red or blue?", "no"), ("is it red?", "no")]
    sample = encoder.encode(questions(*asked))
    assert processor.tokenizer.decode(sample.ids).endswith("</img>") and (sample.labels == IGNORE).all()
    for branch, pair in zip(sample.branches, asked, strict=True):
        alone = [Turn("user", (Picture(SQUARE), Text(pair[0]))), Turn("assistant", (Text(pair[1]),), learn=True)]
        whole = encoder.encode(Conversation(tuple(alone)))
        assert np.concatenate([sample.ids, branch.ids]).tolist() == whole.ids.tolist()
        assert np.concatenate([sample.labels, branch.labels]).tolist() == whole.labels.tolist()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_a_sideways_picture_has_the_tiles_of_what_is_seen(kind: str, processor: SailVL2Processor) -> None:
    encoder = Encoder(processor)
    tall = picture(20, 50, 6, kind)  # seen 50 wide, 20 high
    slot = encoder.encode(
        Conversation((Turn("user", (Picture(tall),)), Turn("assistant", (Text("a"),), learn=True)))
    ).pictures[0]
    upright = Image.linear_gradient("L").resize((20, 50)).convert("RGB").transpose(Image.Transpose.ROTATE_270)
    assert slot.tiles == len(encoder.pixels(slot)) == processor.image_processor.num_tiles(50, 20, 4)
    if kind in ("PNG", "TIFF"):  # lossless
        wanted = processor.image_processor([upright], 4, return_tensors="pt")["pixel_values"]
        assert torch.equal(encoder.pixels(slot), wanted)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "BMP"])
def test_a_picture_is_counted_from_its_header(kind: str, processor: SailVL2Processor) -> None:
    """What comes behind it is not decoded: here it is missing."""
    noise, out = np.random.default_rng(0).integers(0, 255, (96, 32, 3), dtype=np.uint8), io.BytesIO()
    Image.fromarray(noise).save(out, kind)
    shown = Picture(out.getvalue()[: -len(out.getvalue()) // 4])
    encoder = Encoder(processor)
    sample = encoder.encode(Conversation((Turn("user", (shown,)), Turn("assistant", (Text("a"),), learn=True))))
    assert sample.tiles == processor.image_processor.num_tiles(32, 96, 4)
    with pytest.raises(CorruptImageError):
        encoder.pixels(sample.pictures[0])


@pytest.mark.parametrize(
    ("of_picture", "of_encoder", "tiles"), [(None, None, 5), (1, None, 1), (None, 2, 3), (3, 2, 3)]
)
def test_limits_of_tiles(
    of_picture: int | None, of_encoder: int | None, tiles: int, processor: SailVL2Processor
) -> None:
    encoder = Encoder(processor, of_encoder)
    shown = Picture(picture(200, 50), of_picture)
    sample = encoder.encode(Conversation((Turn("user", (shown,)), Turn("assistant", (Text("a"),), learn=True))))
    assert sample.tiles == tiles == len(encoder.pixels(sample.pictures[0]))


@pytest.mark.parametrize("data", [b"", b"no picture", SQUARE[:10]])
def test_a_picture_without_a_header_is_a_bad_record(data: bytes, processor: SailVL2Processor, tmp_path: Path) -> None:
    for source in (data, tmp_path / "missing.png"):
        turns = (Turn("user", (Picture(source),)), Turn("assistant", (Text("a"),), learn=True))
        with pytest.raises(BadRecord, match="here: "):
            Encoder(processor).encode(Conversation(turns, where="here"))


def ids(*values: int) -> Any:
    return np.array(values, np.int32)


def branch(*values: int) -> Branch:
    return Branch(ids(*values), ids(IGNORE, *values[1:]))


def test_split_repeats_what_branches_share_and_keeps_every_branch() -> None:
    branches = tuple(branch(10 * n, 10 * n + 1) for n in range(1, 6))
    sample = Sample(ids(1, 2, 3), ids(*[IGNORE] * 3), branches, (), "here")
    parts = list(split_to_fit(sample, 8))
    assert [len(part) for part in parts] == [7, 7, 5]
    assert all(part.ids is sample.ids and part.where == "here" for part in parts)
    assert tuple(found for part in parts for found in part.branches) == branches
    assert list(split_to_fit(sample, 100)) == [sample]


@pytest.mark.parametrize("branches", [(branch(4, 5),), ()])
def test_split_never_truncates(branches: tuple[Branch, ...]) -> None:
    sample = Sample(ids(1, 2, 3), ids(*[IGNORE] * 3), branches, (), "here")
    with pytest.raises(BadRecord, match=f"here: has {len(sample)} tokens, a stream holds 2"):
        list(split_to_fit(sample, 2))


@pytest.mark.parametrize(("given", "labels"), [((1, 2), (IGNORE,)), ((1, 2), (1, 2))])
def test_labels_that_would_leak_are_refused(given: tuple[int, ...], labels: tuple[int, ...]) -> None:
    for kind in (Branch, Sample):
        with pytest.raises(ValueError, match=f"{kind.__name__}: labels"):
            kind(ids(*given), ids(*labels))


def test_an_encoded_mixture_travels_between_processes(processor: SailVL2Processor) -> None:
    import pickle

    from training.data.easy_vqa import EasyVqa

    data = EncodedMixture(Mixture((EasyVqa("easy_vqa:test"),), (1.0,)), processor, capacity=500)
    again = pickle.loads(pickle.dumps(data))
    assert again.sample(0, 7)[0].ids.tolist() == data.sample(0, 7)[0].ids.tolist()
    (slot,) = data.sample(0, 7)[0].pictures
    assert data.pixels(slot).equal(again.pixels(slot)) and data.pixels(slot).shape[1:] == data.tile_shape
