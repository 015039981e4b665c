"""The objective: branches see what a question alone would see, the loss is the textbook one, the count is exact."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_model import exact_ops, lively_model, one_thread
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from training.device import start_processes, stop_processes
from training.loss import TrainedModel, answer_logits, balance_losses, label_count
from training.packing import IGNORE, Branch, PackedBatch, Sample, pack
from training.records import Record

from sail_model import SailVL2ForConditionalGeneration, SailVL2Processor
from sail_ops.testing import assert_accurate
from training.assemble import answer_ids, build_config, build_processor, chat, encode_one, picture_reader, prompt_ids
from training.evaluate import exact_match
from training.metrics import FlopCount

RECORDS = [
    Record(Path("a"), (("is it red?", "yes"), ("what color is it?", "red"), ("is it blue?", "no"))),
    Record(Path("b"), (("what shape is it?", "circle"),)),
    Record(Path("c"), (("is it not round?", "no"), ("what is it?", "a circle"))),
]


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    with one_thread():
        start_processes()
        yield
        stop_processes()


@pytest.fixture(scope="module")
def processor() -> SailVL2Processor:
    return build_processor("demo", RECORDS)


@pytest.fixture(scope="module")
def model(processor: SailVL2Processor) -> SailVL2ForConditionalGeneration:
    return lively_model(build_config("demo", processor))


def batch_of(records: list[Record], processor: SailVL2Processor) -> PackedBatch[Path]:
    """Two streams, the second one padded."""
    samples = [encode_one(record, processor) for record in records]
    return pack([samples[:2], samples[2:]] if len(samples) > 1 else [samples], processor.tokenizer.pad_token_id)


def pixels(names: list[Path]) -> Tensor:
    return torch.stack(
        [torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(ord(str(name)))) for name in names]
    )


def questions_alone(model: SailVL2ForConditionalGeneration, processor: SailVL2Processor) -> Tensor:
    """Logits before each answer token, every question in a forward pass of its own, through the public forward."""
    logits = []
    for record in RECORDS:
        for question, answer in record.questions:
            ids = prompt_ids(question, processor) + answer_ids(answer, processor)
            out = model(torch.tensor([ids]), pixel_values=pixels([record.picture]).to(model.dtype))
            logits.append(out.logits[0, len(prompt_ids(question, processor)) - 1 : -1])
    return torch.cat(logits)


@torch.no_grad()
def test_a_packed_question_is_answered_as_if_asked_alone(
    model: SailVL2ForConditionalGeneration, processor: SailVL2Processor
) -> None:
    batch = batch_of(RECORDS, processor)
    packed, targets_N, *_ = answer_logits(model, batch, pixels(batch.pictures))
    base = questions_alone(model, processor)
    with exact_ops():
        exact = questions_alone(lively_model(model.config).double(), processor)
    assert_accurate(packed, exact, base, k=4.0, name="packed logits")
    answers = [answer_ids(answer, processor) for record in RECORDS for _, answer in record.questions]
    assert targets_N.tolist() == [token for answer in answers for token in answer]

    # the control: without branches, the answers of a picture's other questions leak
    flat = replace(batch, branch_BL=torch.zeros_like(batch.branch_BL))
    leaking, *_ = answer_logits(model, flat, pixels(batch.pictures))
    with pytest.raises(AssertionError, match="over budget|worst element"):
        assert_accurate(leaking, exact, base, k=4.0)


def test_objective_is_the_summed_cross_entropy_of_the_answers(
    model: SailVL2ForConditionalGeneration, processor: SailVL2Processor
) -> None:
    batch = batch_of(RECORDS, processor)
    logits_NV, targets_N, counts_ME, prob_sum_ME = answer_logits(model, batch, pixels(batch.pictures))
    out = TrainedModel(model)(batch, pixels(batch.pictures))
    by_hand = -logits_NV.double().log_softmax(-1).gather(1, targets_N[:, None]).sum()
    torch.testing.assert_close(out.answer_loss_sum.double(), by_hand)
    assert label_count(batch) == len(targets_N) == int((batch.labels_BL != IGNORE).sum())
    tokens, text = int(batch.token_mask().sum()), model.config.text_config
    assert counts_ME.sum(1).tolist() == [tokens * text.num_experts_per_tok] * text.num_hidden_layers
    torch.testing.assert_close(prob_sum_ME.sum(1), torch.full((text.num_hidden_layers,), float(tokens)))


@pytest.mark.parametrize("pictures", [2, 4])
def test_pictures_and_their_places_must_agree(
    pictures: int, model: SailVL2ForConditionalGeneration, processor: SailVL2Processor
) -> None:
    batch = batch_of(RECORDS, processor)
    message = f"{3 * 16} image tokens .* gives {pictures * 16} image features"
    with pytest.raises(ValueError, match=message):
        TrainedModel(model)(batch, torch.zeros(pictures, 3, 64, 64))


def test_every_parameter_gets_a_dense_gradient(
    model: SailVL2ForConditionalGeneration, processor: SailVL2Processor
) -> None:
    # under ZeRO-2 a parameter that one rank skips gets a silently wrong gradient: experts without a token, a blank
    # picture, a stream without a label must all leave zeros, not None
    batch = batch_of(RECORDS[1:2], processor)
    batch.silence(0)
    model.zero_grad()
    out = TrainedModel(model)(batch, torch.zeros(1, 3, 64, 64))
    assert (out.counts_ME == 0).any(), "the case should leave experts without a token"
    balance = balance_losses(out.counts_ME, out.prob_sum_ME, int(batch.token_mask().sum()), None)
    (out.answer_loss_sum + balance.sum()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_balance_loss_is_kept_apart_by_layer() -> None:
    experts, top_k, tokens = 8, 2, 100
    balanced = torch.full((experts,), tokens * top_k // experts)
    collapsed = torch.zeros(experts, dtype=torch.int64)
    collapsed[:top_k] = tokens
    counts_ME = torch.stack([balanced, collapsed])
    prob_sum_ME = counts_ME.float() / top_k
    losses = balance_losses(counts_ME, prob_sum_ME, tokens, None)
    torch.testing.assert_close(losses, torch.tensor([float(top_k), float(experts)]))


@torch.no_grad()
def test_exact_match_is_what_greedy_generation_gives(
    model: SailVL2ForConditionalGeneration, processor: SailVL2Processor, tmp_path: Path
) -> None:
    path = tmp_path / "picture.png"
    Image.linear_gradient("L").convert("RGB").save(path)
    reader = picture_reader(processor)
    branches, prefix = [], ()
    for n, question in enumerate(("is it red?", "what shape is it?", "is it not round?")):
        inputs = processor(
            images=str(path), text=processor.apply_chat_template(chat(question), add_generation_prompt=True)
        )
        prompt = inputs["input_ids"][0].tolist()
        assert tuple(prompt) == prompt_ids(question, processor)
        generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, len(prompt) :].tolist()
        if n == 1:
            generated[2] = (generated[2] + 1) % model.config.text_config.vocab_size
        start = prompt.index(processor.tokenizer.convert_tokens_to_ids("</img>")) + 1
        prefix, rest = tuple(prompt[:start]), tuple(prompt[start:])
        branches.append(Branch(rest + tuple(generated), (IGNORE,) * len(rest) + tuple(generated)))
    sample = Sample(path, prefix, tuple(branches))
    found = exact_match(model, [sample, sample], reader, capacity=400, pad_id=processor.tokenizer.pad_token_id)
    assert found == (4, 6)


@torch.no_grad()
def test_flop_count_is_what_torch_counts(model: SailVL2ForConditionalGeneration, processor: SailVL2Processor) -> None:
    batch = batch_of(RECORDS, processor)
    # plain matrix products for experts and attention: torch counts neither our operators nor the CPU's fused attention
    with exact_ops(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        answer_logits(model, batch, pixels(batch.pictures))
    attended = batch.attention
    assert attended.keys is not None
    # torch counts every position, padding too, and every (query, key) pair of a sequence, allowed or not
    pairs = int((attended.cu_seqlens.diff() * attended.keys.cu_seqlens.diff()).sum())
    positions = batch.input_ids_BL.numel()
    counted = FlopCount(model, model.config).step(positions, label_count(batch), pairs, len(batch.pictures))
    assert counted == 3 * counter.get_total_flops()


def test_cross_entropy_of_no_label_is_zero_with_a_gradient(
    model: SailVL2ForConditionalGeneration, processor: SailVL2Processor
) -> None:
    batch = batch_of(RECORDS[1:2], processor)
    batch.silence(0)
    out = TrainedModel(model)(batch, pixels(batch.pictures))
    assert out.answer_loss_sum.item() == 0 and out.answer_loss_sum.requires_grad
    assert F.cross_entropy(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), reduction="sum").item() == 0
