"""Held-out exact match, and the baselines that a number needs beside it."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sail_model.model import SailVL2ForConditionalGeneration
from training.device import sum_over_ranks
from training.loss import answer_logits
from training.packing import IGNORE, PackedBatch, Sample, pack, plan_streams
from training.records import PictureReader, Record


class Accuracy(NamedTuple):
    """Answers that were right to the last token, of all that were asked."""

    right: int
    asked: int

    @property
    def share(self) -> float:
        """right / asked."""
        return self.right / max(1, self.asked)


@torch.no_grad()
def exact_match(
    model: SailVL2ForConditionalGeneration,
    samples: Sequence[Sample[Path]],
    reader: PictureReader,
    *,
    capacity: int,
    pad_id: int,
    blank: bool = False,
    streams: int = 8,
) -> Accuracy:
    """An answer counts if the most likely token is right at each of its positions, the end token included.

    Teacher-forced, over all samples, shared among the ranks. The first wrong token decides in greedy generation
    too, so this is the share of answers that greedy generation would give letter for letter. Questions about a
    picture that cannot be read are not asked.
    """
    model.eval()
    plan = plan_streams([len(sample) for sample in samples], range(len(samples)), capacity)
    mine = plan[dist.get_rank() :: dist.get_world_size()]
    right = asked = 0
    for start in range(0, len(mine), streams):
        batch = pack([[samples[number] for number in stream] for stream in mine[start : start + streams]], pad_id)
        pixels, _ = reader.fill(batch, blank=blank)
        correct_N = _correct_tokens(model, batch, pixels.to(model.dtype))
        answer_N = _answer_of_each_label(batch)
        answers = len(answer_N.unique())
        right += int(torch.ones(answers).scatter_reduce(0, answer_N, correct_N.float(), "amin").sum())
        asked += answers
    model.train()
    total_right, total_asked = sum_over_ranks([right, asked])
    return Accuracy(int(total_right), int(total_asked))


def _correct_tokens(model: SailVL2ForConditionalGeneration, batch: PackedBatch, pixels: Tensor) -> Tensor:
    logits_NV, targets_N, *_ = answer_logits(model, batch, pixels)
    return logits_NV.argmax(-1) == targets_N


def _answer_of_each_label(batch: PackedBatch) -> Tensor:
    """For each labeled position, the number of its answer: 0, 1, ... in the batch."""
    labeled = batch.labels_BL[:, 1:] != IGNORE
    row_BL = torch.arange(len(labeled))[:, None].expand_as(labeled)
    owner_N3 = torch.stack([row_BL[labeled], batch.sample_BL[:, 1:][labeled], batch.branch_BL[:, 1:][labeled]], -1)
    return owner_N3.unique(dim=0, return_inverse=True)[1]


def majority_baseline(train: Sequence[Record], test: Sequence[Record]) -> Accuracy:
    """Always give the answer that is most frequent in training."""
    answers = Counter(answer for record in train for _, answer in record.questions)
    best = answers.most_common(1)[0][0]
    given = [answer == best for record in test for _, answer in record.questions]
    return Accuracy(sum(given), len(given))


def question_only_baseline(train: Sequence[Record], test: Sequence[Record]) -> Accuracy:
    """Give each question the answer it most often has in training: what can be known without looking."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for record in train:
        for question, answer in record.questions:
            answers[question][answer] += 1
    best = {question: counter.most_common(1)[0][0] for question, counter in answers.items()}
    given = [best.get(question) == answer for record in test for question, answer in record.questions]
    return Accuracy(sum(given), len(given))
