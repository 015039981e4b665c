"""The objective: branches see what a question alone would see, the loss is the textbook one, the count is exact."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_model import exact_ops, lively_model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sail_ops
from sail_model import SailVL2ForConditionalGeneration, SailVL2Processor
from sail_ops.testing import assert_accurate
from training.assemble import build_config, build_processor, freeze
from training.data.batch import Batch, collate, lay_out
from training.data.conversation import Conversation, Picture, Text, Turn
from training.data.encode import Encoder
from training.data.sample import IGNORE, Branch, PictureSlot, Sample
from training.evaluate import exact_match
from training.metrics import FlopCount
from training.objectives.supervised import Supervised, labeled_logits
from training.recipes import Recipe

pytestmark = pytest.mark.usefixtures("alone")

Questions = tuple[tuple[str, str], ...]
ASKED: tuple[Questions, ...] = (
    (("is it red?", "yes"), ("what color is it?", "red"), ("is it blue?", "no")),
    (("what shape is it?", "circle"),),
    (("is it not round?", "no"), ("what is it?", "a circle")),
)


def turns(question: str, answer: str) -> tuple[Turn, ...]:
    return Turn("user", (Text(question),)), Turn("assistant", (Text(answer),), learn=True)


def about(picture: Path, questions: Questions) -> Conversation:
    """A conversation of a branch for each question."""
    return Conversation((Turn("user", (Picture(picture),)),), tuple(turns(*pair) for pair in questions))


def source_of(record: Conversation) -> Path:
    """Of its one picture."""
    part = record.turns[0].parts[0]
    assert isinstance(part, Picture) and isinstance(part.source, Path)
    return part.source


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Conversation]:
    folder = tmp_path_factory.mktemp("pictures")
    found = []
    for number, questions in enumerate(ASKED):
        path = folder / f"{number}.png"
        noise = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(number))
        Image.fromarray(noise.numpy().astype("uint8")).save(path)
        found.append(about(path, questions))
    return found


@pytest.fixture(scope="module")
def processor(records: list[Conversation]) -> SailVL2Processor:
    return build_processor("demo", records)


@pytest.fixture(scope="module")
def encoder(processor: SailVL2Processor) -> Encoder:
    return Encoder(processor)


@pytest.fixture
def model(processor: SailVL2Processor) -> SailVL2ForConditionalGeneration:
    return lively_model(build_config("demo", processor))


def pixels_of(samples: list[Sample], encoder: Encoder) -> Tensor:
    tiles = [encoder.pixels(picture) for sample in samples for picture in sample.pictures]
    return torch.cat([torch.zeros(0, *encoder.tile_shape), *tiles])


def batch_of(rows: list[list[Sample]], encoder: Encoder, silenced: tuple[int, ...] = ()) -> Batch:
    pad_id = encoder.processor.tokenizer.pad_token_id
    return collate([lay_out(row, pixels_of(row, encoder), silenced) for row in rows], pad_id)


@pytest.fixture
def batch(records: list[Conversation], encoder: Encoder) -> Batch:
    """Two rows, the second one padded."""
    samples = [encoder.encode(record) for record in records]
    return batch_of([samples[:2], samples[2:]], encoder)


def questions_alone(
    model: SailVL2ForConditionalGeneration, records: list[Conversation], encoder: Encoder
) -> tuple[Tensor, list[int]]:
    """Logits before each learned token, every question in a forward pass of its own, through the public forward."""
    logits, learned = [], []
    for record, questions in zip(records, ASKED, strict=True):
        for question in questions:
            sample = encoder.encode(about(source_of(record), (question,)))
            ids, labels = (
                torch.cat([torch.from_numpy(part) for part in parts]).long()
                for parts in ((sample.ids, sample.branches[0].ids), (sample.labels, sample.branches[0].labels))
            )
            out = model(ids[None], pixel_values=pixels_of([sample], encoder).to(model.dtype))
            logits.append(out.logits[0, :-1][labels[1:] != IGNORE])
            learned += labels[labels != IGNORE].tolist()
    return torch.cat(logits), learned


@torch.no_grad()
def test_a_packed_question_is_answered_as_if_asked_alone(
    model: SailVL2ForConditionalGeneration, records: list[Conversation], encoder: Encoder, batch: Batch
) -> None:
    packed, targets_N = labeled_logits(model, batch)
    base, learned = questions_alone(model, records, encoder)
    with exact_ops():
        exact, _ = questions_alone(lively_model(model.config).double(), records, encoder)
    assert_accurate(packed, exact, base, k=4.0, name="packed logits")
    assert targets_N.tolist() == learned

    # the control: as runs of one sample without branches, the answers to a picture's other questions leak
    samples = [encoder.encode(record) for record in records]
    rows = [lay_out(row, pixels_of(row, encoder)) for row in (samples[:2], samples[2:])]
    for row in rows:
        merged: dict[int, int] = {}
        for count, sample, _ in row.runs:
            merged[sample] = merged.get(sample, 0) + count
        row.runs = [(count, sample, 0) for sample, count in merged.items()]
    leaking, _ = labeled_logits(model, collate(rows, encoder.processor.tokenizer.pad_token_id))
    with pytest.raises(AssertionError, match="over budget|worst element"):
        assert_accurate(leaking, exact, base, k=4.0)


def test_objective_is_the_summed_cross_entropy_of_the_answers(
    model: SailVL2ForConditionalGeneration, batch: Batch
) -> None:
    logits_NV, targets_N = labeled_logits(model, batch)
    out = Supervised(model)(batch)
    by_hand = -logits_NV.double().log_softmax(-1).gather(1, targets_N[:, None]).sum()
    torch.testing.assert_close(out.loss_sum.double(), by_hand)
    assert batch.labels == len(targets_N) == int((batch.labels_BL != IGNORE).sum())
    tokens, text = int(batch.token_mask().sum()), model.config.text_config
    assert tokens == batch.tokens < batch.input_ids_BL.numel(), "the case should have padding"
    assert out.counts_ME.sum(1).tolist() == [tokens * text.num_experts_per_tok] * text.num_hidden_layers
    torch.testing.assert_close(out.prob_sum_ME.sum(1), torch.full((text.num_hidden_layers,), float(tokens)))


@pytest.mark.parametrize("tiles", [0, 2, 4])
def test_pictures_and_their_places_must_agree(tiles: int, model: SailVL2ForConditionalGeneration, batch: Batch) -> None:
    message = f"{3 * 16} image tokens .* gives {tiles * 16} image features"
    with pytest.raises(ValueError, match=message):
        Supervised(model)(replace(batch, pixels=torch.zeros(tiles, 3, 64, 64)))


def text_alone(encoder: Encoder) -> Batch:
    return batch_of([[encoder.encode(Conversation(turns("what is round?", "a circle")))]], encoder)


@pytest.mark.parametrize("pictures", [True, False])
@pytest.mark.parametrize("labels", [True, False])
def test_every_parameter_gets_a_dense_gradient(
    pictures: bool, labels: bool, model: SailVL2ForConditionalGeneration, records: list[Conversation], encoder: Encoder
) -> None:
    # under ZeRO a parameter that one rank skips gets a silently wrong gradient: experts without a token, no picture
    # and no label must all leave zeros, not None
    record = records[1] if pictures else Conversation(turns("what is round?", "a circle"))
    batch = batch_of([[encoder.encode(record)]], encoder, () if labels else (0,))
    assert bool(len(batch.pixels)) == pictures and bool(batch.labels) == labels
    out = Supervised(model)(batch)
    assert bool(out.loss_sum > 0) == labels and out.loss_sum.requires_grad
    assert (out.counts_ME == 0).any(), "the case should leave experts without a token"
    balance = sail_ops.load_balancing_loss(out.counts_ME, out.prob_sum_ME, batch.tokens)
    (out.loss_sum + balance.sum()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    seen = [bool(parameter.grad.any()) for parameter in model.vision_model.parameters()]  # type: ignore[union-attr]
    assert any(seen) == pictures


def test_a_blank_tile_that_no_token_shows_changes_no_bit(
    model: SailVL2ForConditionalGeneration, encoder: Encoder
) -> None:
    batch = text_alone(encoder)
    with torch.no_grad():
        want = Supervised(model)(batch)
    got = Supervised(model)(batch)
    assert torch.equal(got.loss_sum, want.loss_sum) and torch.equal(got.prob_sum_ME, want.prob_sum_ME)


@pytest.mark.parametrize("part", ["vision", "adapter"])
def test_without_pictures_all_differentiate_what_those_with_pictures_do(
    part: str, model: SailVL2ForConditionalGeneration, batch: Batch, encoder: Encoder
) -> None:
    """Else the balance loss's all-reduce in backward, or a gather of ZeRO-3's weights, waits for ever."""
    freeze(model, Recipe(train=part))
    for given in (batch, text_alone(encoder)):
        out = Supervised(model)(given)
        assert out.loss_sum.requires_grad and out.prob_sum_ME.requires_grad


class Given:
    """Samples of which only pixels are asked."""

    lengths, weights, tile_shape = [0], [1.0], (3, 64, 64)

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def sample(self, source: int, record: int) -> list[Sample]:
        raise NotImplementedError

    def pixels(self, picture: PictureSlot) -> Tensor:
        return self.encoder.pixels(picture)


@torch.no_grad()
def test_exact_match_is_what_greedy_generation_gives(
    model: SailVL2ForConditionalGeneration, processor: SailVL2Processor, encoder: Encoder, records: list[Conversation]
) -> None:
    picture = source_of(records[0])
    branches: list[Branch] = []
    for n, question in enumerate(("is it red?", "what shape is it?", "is it not round?")):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        chat = [{"role": "system", "content": ""}, {"role": "user", "content": content}]
        inputs = processor(images=str(picture), text=processor.apply_chat_template(chat, add_generation_prompt=True))
        prompt = inputs["input_ids"][0].tolist()
        generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, len(prompt) :].tolist()
        if n == 1:
            generated[2] = (generated[2] + 1) % model.config.text_config.vocab_size
        sample = encoder.encode(about(picture, ((question, "yes"),)))
        rest = prompt[len(sample.ids) :]
        assert prompt[: len(sample.ids)] == sample.ids.tolist()
        ids, labels = torch.tensor(rest + generated), torch.tensor([IGNORE] * len(rest) + generated)
        branches.append(replace(sample.branches[0], ids=ids.int().numpy(), labels=labels.int().numpy()))
    sample = replace(sample, branches=tuple(branches))
    pad_id = processor.tokenizer.pad_token_id
    found = exact_match(model, Given(encoder), [sample, sample], capacity=400, pad_id=pad_id)
    assert found == (4, 6) and found.share == 4 / 6 and model.training


@torch.no_grad()
def test_flop_count_is_what_torch_counts(model: SailVL2ForConditionalGeneration, batch: Batch) -> None:
    # plain matrix products for experts and attention: torch counts neither our operators nor the CPU's fused attention
    with exact_ops(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        labeled_logits(model, batch)
    keys = batch.attention.keys
    assert keys is not None
    # torch counts every position, padding too, and every (query, key) pair of a sequence, allowed or not
    pairs = int((batch.attention.cu_seqlens.diff() * keys.cu_seqlens.diff()).sum())
    positions, tiles = batch.input_ids_BL.numel(), len(batch.pixels)
    counted = FlopCount(model, model.config).step(positions, batch.labels, pairs, tiles)
    assert counted == 3 * counter.get_total_flops()

    # a frozen part costs its forward alone, and once more where something below it is trained
    for parts, times in {
        "vision": (3, 2, 2),
        "adapter": (1, 3, 2),
        "language": (1, 1, 3),
        "adapter,language": (1, 3, 3),
        "vision,language": (3, 2, 3),
    }.items():
        freeze(model, Recipe(train=parts))
        assert tuple(FlopCount(model, model.config).times.values()) == times, parts
