"""SAIL-VL2 in transformers' Trainer: what it inspects, hands over and collects."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_model import PAD, lively_model, one_thread, pixels, prompt, tiny_config
from torch import Tensor
from transformers import Trainer, TrainingArguments

from sail_model import SailVL2ForConditionalGeneration

Row = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def model() -> SailVL2ForConditionalGeneration:
    return lively_model(tiny_config(True))


def rows() -> list[Row]:
    """Four prompts with 2, 0, 1 and 1 tiles, of which very different numbers of tokens are labelled."""
    data = []
    for tiles, words, labelled in ((2, 9, 3), (0, 12, 8), (1, 20, 15), (1, 4, 2)):
        ids = prompt(tiles, words, words)
        labels = torch.where(torch.arange(len(ids)) >= len(ids) - labelled, ids, -100)
        data.append(dict(input_ids=ids, labels=labels, pixel_values=pixels(tiles, words)))
    return data


def collate(data: list[Row]) -> Row:
    def padded(name: str, value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([row[name] for row in data], batch_first=True, padding_value=value)

    ids, tiles = padded("input_ids", PAD), torch.cat([row["pixel_values"] for row in data])
    batch = dict(input_ids=ids, attention_mask=(ids != PAD).long(), labels=padded("labels", -100))
    return batch | (dict(pixel_values=tiles) if len(tiles) else {})


def trainer(model: SailVL2ForConditionalGeneration, folder: Path, **options: Any) -> Trainer:
    common = dict(max_steps=1, learning_rate=0.0, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True)
    return Trainer(
        model,
        TrainingArguments(str(folder), **common, **options),
        train_dataset=rows(),
        eval_dataset=rows(),
        data_collator=collate,
        compute_metrics=lambda _: {},
    )


@pytest.mark.parametrize(("batch", "steps"), [(4, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_accumulated_batches_are_one_batch(
    smoothing: float, batch: int, steps: int, model: SailVL2ForConditionalGeneration, tmp_path: Path
) -> None:
    """The mean over all labelled tokens of (1 - s) * -log p(next token) + s * mean over the vocabulary of -log p."""
    inputs = collate(rows())
    labels = inputs.pop("labels")[:, 1:]
    log_p = model(**inputs).logits[:, :-1][labels != -100].log_softmax(-1)
    want = (1 - smoothing) * F.nll_loss(log_p, labels[labels != -100]) - smoothing * log_p.mean()
    options = dict(per_device_train_batch_size=batch, gradient_accumulation_steps=steps)
    got = trainer(model, tmp_path, **options, label_smoothing_factor=smoothing).train().training_loss
    torch.testing.assert_close(torch.tensor(got), want.detach(), check_dtype=False)


@pytest.mark.parametrize(("batch", "steps"), [(4, 1), (2, 2), (1, 4)])
def test_balance_loss_of_accumulated_batches_is_a_mean(
    batch: int, steps: int, model: SailVL2ForConditionalGeneration, tmp_path: Path
) -> None:
    """Over batches, each in the proportion of its labelled tokens, as the cross-entropy is; not their sum."""
    text = model.config.text_config
    text.output_router_logits, text.router_aux_loss_coef = True, 0.3
    data, want = rows(), torch.zeros(())
    items = sum((row["labels"][1:] != -100).sum() for row in data)
    for start in range(0, 4, batch):
        out = model(**collate(data[start : start + batch]), num_items_in_batch=items)
        labelled = sum((row["labels"][1:] != -100).sum() for row in data[start : start + batch])
        cross_entropy = model(**collate(data[start : start + batch]), output_router_logits=False).loss
        want = want + labelled / items * (cross_entropy + 0.3 * out.aux_loss)
        torch.testing.assert_close(out.loss, labelled / items * (cross_entropy + 0.3 * out.aux_loss))
    options = dict(per_device_train_batch_size=batch, gradient_accumulation_steps=steps)
    got = trainer(model, tmp_path, **options, train_sampling_strategy="sequential").train().training_loss
    torch.testing.assert_close(torch.tensor(got), want.detach(), check_dtype=False)


def test_evaluation_collects_logits_and_labels(model: SailVL2ForConditionalGeneration, tmp_path: Path) -> None:
    """Batches of three and one prompt; routing statistics and image features have no row for each."""
    model.config.text_config.output_router_logits = True
    out = trainer(model, tmp_path, per_device_eval_batch_size=3).predict(rows())
    last = rows()[-1]
    assert out.predictions.shape == (4, 20 + 4, 300) and out.label_ids.shape == (4, 20 + 4)
    alone = model(input_ids=last["input_ids"][None], pixel_values=last["pixel_values"]).logits[0]
    torch.testing.assert_close(torch.from_numpy(out.predictions)[-1, : len(alone)], alone)
