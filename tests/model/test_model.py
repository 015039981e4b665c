"""SAIL-VL2's own behavior: packing, generation, loss, routing statistics, what it refuses."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_model import EOS, IMAGE, PAD, exact_ops, lively_model, one_thread, pixels, prompt, tiny_config
from torch import Tensor

import sail_ops
from sail_model import SailVL2ForConditionalGeneration
from sail_model.attention import causal_attention, pack_of_padding
from sail_ops import testing
from sail_ops.testing import assert_accurate

Model = SailVL2ForConditionalGeneration


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def gradients(model: Model, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def exact(model: Model, call: Callable[[Model, torch.dtype], Any]) -> Any:
    """The call on a copy of the model in fp64, on the reference operators."""
    wide = Model(model.config).double().eval()
    wide.load_state_dict({key: value.double() for key, value in model.state_dict().items()})
    with exact_ops():
        return call(wide, torch.float64)


# ---- packing --------------------------------------------------------------------------------------------------------
STREAM = [prompt(1, 9, 1), prompt(0, 1, 2), prompt(2, 4, 3), prompt(0, 33, 4), prompt(0, 2, 5), prompt(1, 9, 6)]


def packed(model: Model, dtype: torch.dtype, **kwargs: Any) -> Any:
    ids = torch.cat(STREAM)[None]
    cu_seqlens = F.pad(torch.tensor([len(row) for row in STREAM]).cumsum(0), (1, 0)).int()
    return model(input_ids=ids, pixel_values=pixels(4).to(dtype), cu_seqlens=cu_seqlens, labels=ids, **kwargs)


def separate(model: Model, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits of the samples one by one, and the loss over all of them."""
    logits, tiles = [], pixels(4).to(dtype).split([1, 0, 2, 0, 0, 1])
    for row, tile in zip(STREAM, tiles, strict=True):
        out = model(input_ids=row[None], pixel_values=tile if len(tile) else None)
        logits.append(out.logits[0])
    total = sum(F.cross_entropy(each[:-1], row[1:], reduction="sum") for each, row in zip(logits, STREAM, strict=True))
    return torch.cat(logits), total / sum(len(row) - 1 for row in STREAM)


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_packed_stream_equals_separate_samples(moe: bool) -> None:
    model = lively_model(tiny_config(moe))
    out = packed(model, torch.float32)
    alone, alone_loss = separate(model, torch.float32)
    reference, reference_loss = exact(model, separate)
    # pooled: over a whole model, the errors of one row are too alike to average out
    assert_accurate(out.logits.flatten(), reference.flatten(), alone.flatten(), name="logits")
    assert_accurate(out.loss, reference_loss, alone_loss, name="loss")
    got, base = gradients(model, out.loss), gradients(model, alone_loss)
    want = exact(model, lambda wide, dtype: gradients(wide, separate(wide, dtype)[1]))
    for name in ("vision_model.preprocessor.pos_embed", "language_model.model.embed_tokens.weight"):
        assert_accurate(got[name].flatten(), want[name].flatten(), base[name].flatten(), name=name)


def test_packed_samples_do_not_see_each_other() -> None:
    model = lively_model(tiny_config(True))
    ids = torch.cat(STREAM)[None]
    changed = ids.clone()
    changed[0, len(STREAM[0])] = 17
    cu_seqlens = F.pad(torch.tensor([len(row) for row in STREAM]).cumsum(0), (1, 0))
    before, after = (
        model(input_ids=each, pixel_values=pixels(4), cu_seqlens=cu_seqlens).logits[0] for each in (ids, changed)
    )
    differs = (before != after).any(-1).nonzero().flatten()
    assert differs.tolist() == [len(STREAM[0])], "a sample of one token changed, and nothing else may"


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([0, 3, 7], "rise from 0 to 8"),
        ([1, 8], "rise from 0 to 8"),
        ([0, 5, 5, 8], "rise from 0 to 8"),
        ([0.0, 8.0], "int32 or int64"),
        ([[0, 8]], "int32 or int64"),
    ],
)
def test_bad_cu_seqlens(cu_seqlens: Any, message: str) -> None:
    model = lively_model(tiny_config(False))
    with pytest.raises(ValueError, match=message):
        model(input_ids=torch.full((1, 8), 5), cu_seqlens=torch.tensor(cu_seqlens))


def test_packing_excludes_batches_and_caches() -> None:
    model, cu_seqlens = lively_model(tiny_config(False)), torch.tensor([0, 8])
    with pytest.raises(ValueError, match="batch of one"):
        model(input_ids=torch.full((2, 8), 5), cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match="excludes"):
        model(input_ids=torch.full((1, 8), 5), cu_seqlens=cu_seqlens, use_cache=True)


# ---- generation -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_generate_with_cache_equals_without(moe: bool) -> None:
    model = lively_model(tiny_config(moe))
    rows = [prompt(2, 6, 1), prompt(1, 4, 2)]
    width = max(map(len, rows))
    ids = torch.stack([F.pad(row, (width - len(row), 0), value=PAD) for row in rows])
    inputs = dict(input_ids=ids, attention_mask=(ids != PAD).long(), pixel_values=pixels(3))
    greedy = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
    cached, uncached = (model.generate(**inputs, **greedy, use_cache=use) for use in (True, False))
    assert cached.shape == (2, width + 8)
    assert torch.equal(cached, uncached)
    # each row generates what it generates without the other row and without padding
    for row, tiles, got in zip(rows, pixels(3).split([2, 1]), cached, strict=True):
        alone = model.generate(input_ids=row[None], pixel_values=tiles, **greedy)
        assert torch.equal(alone[0, len(row) :], got[width:])


def test_generate_samples_beams_and_static_cache() -> None:
    model = lively_model(tiny_config(True))
    inputs = dict(input_ids=prompt(1, 6, 1)[None], pixel_values=pixels(1), max_new_tokens=5, min_new_tokens=5)
    greedy = model.generate(**inputs, do_sample=False)
    assert torch.equal(model.generate(**inputs, do_sample=False, cache_implementation="static"), greedy)
    beams = model.generate(**inputs, do_sample=False, num_beams=3)
    assert beams.shape == greedy.shape
    torch.manual_seed(0)
    assert model.generate(**inputs, do_sample=True, num_return_sequences=2).shape == (2, greedy.shape[1])


def test_padding_and_a_static_cache() -> None:
    model = lively_model(tiny_config(False))
    rows = [prompt(0, 9, 1), prompt(0, 4, 2)]
    ids = torch.stack([F.pad(row, (len(rows[0]) - len(row), 0), value=PAD) for row in rows])
    inputs = dict(input_ids=ids, attention_mask=(ids != PAD).long())
    inputs |= dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    greedy = model.generate(**inputs)
    assert torch.equal(model.generate(**inputs, cache_implementation="static"), greedy)


@pytest.mark.parametrize("length", [9, 3], ids=["whole", "after a cache"])
def test_padding_anywhere_is_a_pack(length: int) -> None:
    """Tokens see the tokens before them, whatever padding lies between; padding gives 0 and its gradient is 0."""
    shapes = (3, length, 4, 8), (3, 9, 2, 8), (3, 9, 2, 8)
    q, k, v = (testing.random(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes))
    mask = torch.tensor([[1] * 9, [0, 0, 1, 1, 1, 1, 1, 1, 0], [1, 0, 1, 1, 0, 0, 1, 0, 1]]).bool()
    real = mask[:, 9 - length :]
    got = causal_attention(q, k, v, pack=pack_of_padding(mask, length))
    allowed = (torch.ones(length, 9).tril(9 - length).bool() & mask[:, None])[:, None]
    want = causal_attention(q, k, v, mask=allowed)
    torch.testing.assert_close(got[real], want[real])
    assert not got[~real].any()
    upstream = torch.where(real[:, :, None, None], torch.randn_like(got), 0.0)
    gradients = [torch.autograd.grad(out[real], (q, k, v), upstream[real]) for out in (got, want)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_image_tokens_are_never_generated(tmp_path: Path) -> None:
    model = lively_model(tiny_config(False, tie_word_embeddings=True))
    embeddings = model.get_input_embeddings().weight
    embeddings.data[IMAGE] = 100 * embeddings.data[5]  # the likeliest or the least likely token of every step
    for sign in (1, -1):
        embeddings.data[IMAGE] *= sign
        model.save_pretrained(tmp_path)
        again = Model.from_pretrained(tmp_path)
        ids = again.generate(input_ids=prompt(0, 6, 1)[None], max_new_tokens=8, do_sample=False, use_cache=False)
        assert IMAGE not in ids
    assert (again.generation_config.eos_token_id, again.generation_config.pad_token_id) == (EOS, PAD)


def test_mask_of_one_s_own() -> None:
    """A [B, 1, L, L] mask: here two prompts side by side, as a packed stream has them."""
    model = lively_model(tiny_config(True))
    ids = torch.cat([prompt(1, 6, 1), prompt(0, 9, 2)])[None]
    sample = (torch.arange(19) >= 10).int()
    mask = (sample[:, None] == sample[None]).tril()[None, None]
    positions = torch.cat([torch.arange(10), torch.arange(9)])[None]
    own = model(input_ids=ids, pixel_values=pixels(1), attention_mask=mask, position_ids=positions)
    stream = model(input_ids=ids, pixel_values=pixels(1), cu_seqlens=torch.tensor([0, 10, 19]))
    torch.testing.assert_close(own.logits, stream.logits)
    assert torch.equal(own.counts_ME, stream.counts_ME)


def test_cache_in_two_parts_equals_one() -> None:
    model, ids = lively_model(tiny_config(True)), prompt(1, 12, 1)[None]
    whole = model(input_ids=ids, pixel_values=pixels(1))
    start = model(input_ids=ids[:, :9], pixel_values=pixels(1), use_cache=True)
    rest = model(input_ids=ids[:, 9:], past_key_values=start.past_key_values)
    wide = exact(model, lambda m, dtype: m(input_ids=ids, pixel_values=pixels(1).to(dtype)).logits)
    parts = torch.cat([start.logits, rest.logits], 1)
    assert_accurate(parts.flatten(), wide.flatten(), whole.logits.flatten())


# ---- loss -----------------------------------------------------------------------------------------------------------
def test_loss_is_that_of_the_next_labelled_token() -> None:
    model, ids = lively_model(tiny_config(False)), prompt(1, 12, 1)[None]
    labels = torch.where(torch.arange(ids.shape[1]) < 9, -100, ids)
    out = model(input_ids=ids, pixel_values=pixels(1), labels=labels)
    by_hand = F.cross_entropy(out.logits[0, 8:-1], ids[0, 9:])
    torch.testing.assert_close(out.loss, by_hand)
    summed = model(input_ids=ids, pixel_values=pixels(1), labels=labels, num_items_in_batch=2)
    torch.testing.assert_close(summed.loss, by_hand * (ids.shape[1] - 9) / 2)


def test_logits_to_keep_keeps_the_loss() -> None:
    model = lively_model(tiny_config(True))
    full = packed(model, torch.float32)
    kept = torch.tensor([3, 4, 20])
    part = packed(model, torch.float32, logits_to_keep=kept)
    torch.testing.assert_close(part.logits, full.logits[:, kept])
    torch.testing.assert_close(part.loss, F.cross_entropy(full.logits[0, kept], torch.cat(STREAM)[kept + 1]))
    torch.testing.assert_close(packed(model, torch.float32, logits_to_keep=2).logits, full.logits[:, -2:])


# ---- routing statistics ---------------------------------------------------------------------------------------------
def test_routing_statistics_count_tokens_and_not_padding() -> None:
    model = lively_model(tiny_config(True))
    rows = [prompt(1, 6, 1), prompt(1, 9, 2)]
    alone = [model(input_ids=row[None], pixel_values=pixels(1)) for row in rows]
    width = max(map(len, rows))
    ids = torch.stack([F.pad(row, (0, width - len(row)), value=PAD) for row in rows])
    out = model(input_ids=ids, attention_mask=(ids != PAD).long(), pixel_values=pixels(1).repeat(2, 1, 1, 1))
    assert out.num_tokens == sum(map(len, rows))
    assert torch.equal(out.counts_ME, alone[0].counts_ME + alone[1].counts_ME)
    assert out.counts_ME.sum(1).tolist() == [2 * out.num_tokens] * 3
    torch.testing.assert_close(out.prob_sum_ME, alone[0].prob_sum_ME + alone[1].prob_sum_ME)
    in_a_stream = model(
        input_ids=ids.view(1, -1),
        attention_mask=(ids != PAD).long().view(1, -1),
        cu_seqlens=torch.tensor([0, len(rows[0]), width, 2 * width]),
        pixel_values=pixels(1).repeat(2, 1, 1, 1),
    )
    assert torch.equal(in_a_stream.counts_ME, out.counts_ME)
    assert in_a_stream.num_tokens == out.num_tokens


def test_balance_loss_reaches_every_router_and_only_dense_has_none() -> None:
    model = lively_model(tiny_config(True))
    out = model(input_ids=prompt(0, 20, 1)[None])
    losses = [
        sail_ops.load_balancing_loss(counts, sums, out.num_tokens)
        for counts, sums in zip(out.counts_ME, out.prob_sum_ME, strict=True)
    ]
    grads = gradients(model, torch.stack(losses).sum())
    for layer in range(3):
        assert grads[f"language_model.model.layers.{layer}.mlp.gate.weight"].any()
    dense = lively_model(tiny_config(False))(input_ids=prompt(0, 20, 1)[None])
    assert dense.counts_ME is None and dense.prob_sum_ME is None and dense.num_tokens is None


# ---- memory ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_every_product_of_a_step_in_fp16_is_ours(moe: bool) -> None:
    """On a CPU torch's are slow (sail_ops.linear); what is left to it are the patches, a convolution."""
    model, ids = lively_model(tiny_config(moe)).half().train(), torch.cat(STREAM)[None]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(input_ids=ids, pixel_values=pixels(4).half(), labels=ids).loss.backward()
    names = {event.key for event in profile.key_averages()}
    assert {"sail_ops::linear", "sail_ops::linear_backward"} <= names
    assert not names & {"aten::mm", "aten::addmm", "aten::bmm"}


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    model = lively_model(tiny_config(True)).train()

    def step() -> tuple[Any, dict[str, Tensor]]:
        out = packed(model, torch.float32)
        return out, gradients(model, out.loss + 0.1 * out.prob_sum_ME.square().mean())

    plain, plain_grads = step()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert all(layer.gradient_checkpointing for layer in model.language_model.model.layers)
    again, again_grads = step()
    assert torch.equal(again.loss, plain.loss)
    assert again_grads.keys() == plain_grads.keys()
    for name, gradient in plain_grads.items():
        assert torch.equal(again_grads[name], gradient), name


# ---- image tokens ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("tokens", "tiles"), [(2, 1), (1, 2), (1, 0), (0, 1)])
def test_image_tokens_and_features_must_agree(tokens: int, tiles: int) -> None:
    model = lively_model(tiny_config(False))
    with pytest.raises(ValueError, match=f"{4 * tokens} image tokens .* {4 * tiles} image features"):
        model(input_ids=prompt(tokens, 6, 1)[None], pixel_values=pixels(tiles) if tiles else None)


def test_a_broken_image_span_is_refused() -> None:
    ids = prompt(1, 6, 1)
    with pytest.raises(ValueError, match="3 image tokens"):
        lively_model(tiny_config(False))(input_ids=ids[3:][None], pixel_values=pixels(1))


def test_bad_pictures_and_inputs() -> None:
    model, ids = lively_model(tiny_config(False)), prompt(1, 6, 1)[None]
    with pytest.raises(ValueError, match=r"\[1, 3, 28, 28\], wanted \[tiles, 3, 56, 56\]"):
        model(input_ids=ids, pixel_values=pixels(1)[..., :28, :28])
    with pytest.raises(ValueError, match="give input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="excludes"):
        model(input_ids=ids, inputs_embeds=torch.zeros(1, 3, 64))


def test_embeddings_in_the_place_of_ids() -> None:
    model, ids = lively_model(tiny_config(False)), prompt(0, 6, 1)[None]
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(input_ids=ids).logits)
