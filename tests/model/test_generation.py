"""`generate` with pictures: tiles stay with their prompt, whatever repeats, keeps or slices it."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_model import PAD, lively_model, one_thread, pixels, prompt, tiny_config
from torch import Tensor
from transformers import DynamicCache

from sail_model import SailVL2ForConditionalGeneration

Model = SailVL2ForConditionalGeneration
GREEDY: dict[str, Any] = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
TILES = (3, 0, 1)  # of three prompts of one batch


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def model() -> Model:
    return lively_model(tiny_config(False))


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    """Three prompts, padded on the left."""
    rows = [prompt(tiles, words, tiles) for tiles, words in zip(TILES, (6, 4, 9), strict=True)]
    width = max(map(len, rows))
    ids = torch.stack([F.pad(row, (width - len(row), 0), value=PAD) for row in rows])
    return dict(input_ids=ids, attention_mask=(ids != PAD).long(), pixel_values=pixels(sum(TILES)))


@pytest.fixture(scope="module")
def greedy(model: Model, batch: dict[str, Tensor]) -> Tensor:
    return model.generate(**batch, **GREEDY)


# ---- several sequences of a prompt ----------------------------------------------------------------------------------
def test_sampled_sequences_see_their_own_tiles(model: Model, batch: dict[str, Tensor], greedy: Tensor) -> None:
    """top_k=1 is greedy, so all sequences of a prompt are the one it gives alone; its pictures are encoded once."""
    encoded = []
    with model.vision_model.register_forward_hook(lambda _, __, out: encoded.append(len(out))):
        two = model.generate(**batch, **GREEDY | dict(do_sample=True), top_k=1, num_return_sequences=2)
    assert torch.equal(two, greedy.repeat_interleave(2, 0))
    assert encoded == [sum(TILES)]


@pytest.mark.parametrize(
    "cache", [{}, dict(use_cache=False), dict(cache_implementation="static")], ids=["cache", "no cache", "static"]
)
def test_beams_see_their_own_tiles(cache: dict[str, Any], model: Model, batch: dict[str, Tensor]) -> None:
    """The score of a beam is the mean log-probability of its tokens on the pictures of its prompt."""
    options = dict(num_beams=3, num_return_sequences=2, output_scores=True, return_dict_in_generate=True)
    out = model.generate(**batch, **GREEDY, **options, **cache)
    width = batch["input_ids"].shape[1]
    for number, (ids, score) in enumerate(zip(out.sequences, out.sequences_scores, strict=True)):
        row = number // 2
        real = torch.cat([batch["attention_mask"][row].bool(), torch.ones(len(ids) - width).bool()])
        tiles = batch["pixel_values"].split(TILES)[row]
        logits = model(input_ids=ids[real][None], pixel_values=tiles if len(tiles) else None).logits[0, -7:-1]
        torch.testing.assert_close(score, logits.log_softmax(-1).gather(1, ids[width:, None]).mean())


def test_features_in_the_place_of_pixels(model: Model, batch: dict[str, Tensor], greedy: Tensor) -> None:
    features = model.get_image_features(batch["pixel_values"]).detach()
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(model.generate(**text, image_features=features, **GREEDY), greedy)
    embeds = model.model.embed(batch["input_ids"], features)
    generated = model.generate(inputs_embeds=embeds, attention_mask=batch["attention_mask"], **GREEDY)
    assert torch.equal(generated, greedy[:, -6:])


# ---- assisted decoding ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", [0, 1], ids=["good drafts", "bad drafts"])
def test_an_assistant_sees_the_pictures_with_its_own_encoder(seed: int, model: Model) -> None:
    """Where the assistant is the model itself, its drafts are accepted if it saw what the model sees."""
    text = {} if seed == 0 else dict(hidden_size=32, num_hidden_layers=1)
    draft = lively_model(tiny_config(False, **text), seed)
    inputs = dict(input_ids=prompt(2, 9, 1)[None], pixel_values=pixels(2))
    want, steps = model.generate(**inputs, **GREEDY), []
    with model.language_model.model.register_forward_hook(lambda *_: steps.append(1)):
        got = model.generate(**inputs, **GREEDY, assistant_model=draft)
    assert torch.equal(got, want)
    assert (len(steps) < 6) == (seed == 0)


def test_prompt_lookup_never_drafts_image_tokens(model: Model) -> None:
    ids = prompt(2, 9, 1)
    ids[-2:] = ids[:2]  # what follows the same words in the prompt are image tokens
    inputs = dict(input_ids=ids[None], pixel_values=pixels(2))
    looked_up = model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=4)
    assert torch.equal(looked_up, model.generate(**inputs, **GREEDY))


# ---- kept caches ----------------------------------------------------------------------------------------------------
def second_turn(model: Model, new_tiles: int) -> tuple[dict[str, Tensor], DynamicCache]:
    """The inputs of a second turn with `new_tiles` tiles of its own, and the cache of the first, which has two."""
    cache = DynamicCache(config=model.config.text_config)
    first = model.generate(input_ids=prompt(2, 9, 1)[None], pixel_values=pixels(2), past_key_values=cache, **GREEDY)
    ids = torch.cat([first, prompt(new_tiles, 5, 2)[None]], 1)
    return dict(input_ids=ids, pixel_values=pixels(2 + new_tiles)), cache


@pytest.mark.parametrize("given", ["all pictures", "new pictures", "new tokens"])
@pytest.mark.parametrize("new_tiles", [0, 1, 2])
def test_second_turn_on_a_kept_cache(new_tiles: int, given: str, model: Model) -> None:
    """Two new tiles are as many as the cache holds; only new ones are encoded."""
    inputs, cache = second_turn(model, new_tiles)
    want, encoded = model.generate(**inputs, **GREEDY), []
    kept: dict[str, Any] = dict(inputs)
    if given != "all pictures":
        kept["pixel_values"] = inputs["pixel_values"][2:] if new_tiles else None
    if given == "new tokens":
        kept["attention_mask"] = torch.ones_like(inputs["input_ids"])
        kept["input_ids"] = inputs["input_ids"][:, cache.get_seq_length() :]
    with model.vision_model.register_forward_hook(lambda _, __, out: encoded.append(len(out))):
        got = model.generate(**kept, past_key_values=cache, **GREEDY)
    assert torch.equal(got[:, -6:], want[:, -6:])
    assert encoded == [new_tiles] * (new_tiles > 0)


def test_a_cache_repeated_for_beams(model: Model) -> None:
    inputs, cache = second_turn(model, 1)
    with pytest.raises(ValueError, match="past_key_values holds 1 rows, but 3 sequences"):
        model.generate(**inputs, past_key_values=cache, num_beams=3, **GREEDY)
    cache.batch_repeat_interleave(3)
    got = model.generate(**inputs, past_key_values=cache, num_beams=3, **GREEDY)
    assert torch.equal(got, model.generate(**inputs, num_beams=3, **GREEDY))


# ---- what is refused ------------------------------------------------------------------------------------------------
def test_a_new_picture_without_pixels_is_refused(model: Model) -> None:
    inputs, cache = second_turn(model, 1)
    with pytest.raises(ValueError, match="4 image tokens .* gives 0 image features"):
        model.generate(input_ids=inputs["input_ids"], past_key_values=cache, **GREEDY)


@pytest.mark.parametrize("given", [3, 5])
def test_tiles_that_no_prompt_asks_for_are_refused(given: int, model: Model, batch: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=rf"\[12, 0, 4\] image tokens, but the {given} tiles given have 4 each"):
        model.generate(**batch | dict(pixel_values=pixels(given)), num_return_sequences=2, do_sample=True)


def test_assisted_decoding_on_a_kept_cache_is_refused(model: Model) -> None:
    inputs, cache = second_turn(model, 0)
    with pytest.raises(ValueError, match="assisted decoding needs empty past_key_values"):
        model.generate(**inputs, past_key_values=cache, prompt_lookup_num_tokens=3, **GREEDY)


def test_inputs_that_exclude_each_other(model: Model, batch: dict[str, Tensor]) -> None:
    features = model.get_image_features(batch["pixel_values"]).detach()
    with pytest.raises(ValueError, match="image_features excludes pixel_values"):
        model.generate(**batch, image_features=features, **GREEDY)
    with pytest.raises(ValueError, match="mm_encoder_outputs"):
        model.generate(**batch, mm_encoder_outputs={"image": features}, **GREEDY)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(ValueError, match="inputs_embeds excludes"):
        model.generate(inputs_embeds=embeds, pixel_values=batch["pixel_values"], **GREEDY)


def test_long_prompts_in_chunks(model: Model) -> None:
    """Of text; a chunk of a prompt with pictures would need a part of them."""
    ids = prompt(0, 9, 1)[None]
    assert torch.equal(model.generate(input_ids=ids, prefill_chunk_size=4, **GREEDY), model.generate(ids, **GREEDY))
    with pytest.raises(ValueError, match="Chunked prefill cannot split|image features"):
        model.generate(input_ids=prompt(2, 9, 1)[None], pixel_values=pixels(2), prefill_chunk_size=6, **GREEDY)
