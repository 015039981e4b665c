"""Held-out exact match, and the baselines that a number needs beside it."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sail_model.model import SailVL2ForConditionalGeneration
from training import parallel
from training.data.batch import Batch, collate
from training.data.conversation import Conversation, Text
from training.data.packing import plan_rows
from training.data.sample import IGNORE, Sample, Samples
from training.data.streams import decoded_row
from training.objectives.supervised import labeled_logits

Pair = tuple[str, str]  # question, answer


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
    data: Samples,
    samples: Sequence[Sample],
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
    rows = plan_rows([len(sample) for sample in samples], capacity)[parallel.rank() :: parallel.world()]
    right = asked = 0
    for start in range(0, len(rows), streams):
        some = [[samples[number] for number in row] for row in rows[start : start + streams]]
        batch = collate([decoded_row(row, data, blank=blank)[0] for row in some], pad_id).to(
            parallel.device(), model.dtype
        )
        logits_NV, targets_N = labeled_logits(model, batch)
        correct_N, answer_N = logits_NV.argmax(-1) == targets_N, _answer_of_each_label(batch)
        answers = len(answer_N.unique())
        ones = torch.ones(answers, device=correct_N.device)
        right += int(ones.scatter_reduce(0, answer_N, correct_N.float(), "amin").sum())
        asked += answers
    model.train()
    total_right, total_asked = parallel.sum_over_ranks([right, asked])
    return Accuracy(int(total_right), int(total_asked))


def _answer_of_each_label(batch: Batch) -> Tensor:
    """For each labeled position, the number of its answer: 0, 1, ... in the batch."""
    labeled = batch.labels_BL[:, 1:] != IGNORE
    row_BL = torch.arange(len(labeled), device=labeled.device)[:, None].expand_as(labeled)
    owner_N3 = torch.stack([row_BL[labeled], batch.sample_BL[:, 1:][labeled], batch.branch_BL[:, 1:][labeled]], -1)
    return owner_N3.unique(dim=0, return_inverse=True)[1]


def pairs(records: Iterable[Conversation]) -> Iterator[Pair]:
    """(question, answer) of every conversation of one turn each, and of every branch."""
    for record in records:
        for branch in record.branches or ((),):
            words: dict[str, str] = defaultdict(str)
            for turn in (*record.turns, *branch):
                words[turn.role] += "".join(part.text for part in turn.parts if isinstance(part, Text))
            yield words["user"], words["assistant"]


def majority_baseline(train: Iterable[Pair], test: Iterable[Pair]) -> Accuracy:
    """Always give the answer that is most frequent in training."""
    best = Counter(answer for _, answer in train).most_common(1)[0][0]
    given = [answer == best for _, answer in test]
    return Accuracy(sum(given), len(given))


def question_only_baseline(train: Iterable[Pair], test: Iterable[Pair]) -> Accuracy:
    """Give each question the answer it most often has in training: what can be known without looking."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for question, answer in train:
        answers[question][answer] += 1
    best = {question: counter.most_common(1)[0][0] for question, counter in answers.items()}
    given = [best.get(question) == answer for question, answer in test]
    return Accuracy(sum(given), len(given))
