"""What training minimizes: cross-entropy of the answers, plus a load-balancing loss per expert layer.

B streams, L tokens a stream, N labeled positions, V vocabulary, M expert layers, E experts. Both terms are
normalized over all ranks before the gradients are averaged, so the number of processes does not change the loss.
"""

from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

import sail_ops
from sail_model.model import SailVL2ForConditionalGeneration
from training.packing import IGNORE, PackedBatch


class Objective(NamedTuple):
    """One micro-batch: summed answer loss (fp32), and `sail_ops.route_topk`'s statistics of each expert layer."""

    answer_loss_sum: Tensor
    counts_ME: Tensor
    prob_sum_ME: Tensor


class TrainedModel(nn.Module):
    """The model and its objective as one module, for an engine to wrap: a packed batch in, an `Objective` out."""

    def __init__(self, model: SailVL2ForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PackedBatch, pixel_values: Tensor) -> Objective:
        """sum over labels of -log softmax(logits of the position before)[label]; padding is in no statistic."""
        hidden_ND, targets_N, counts_ME, prob_sum_ME = answer_states(self.model, batch, pixel_values)
        head_VD = cast(Tensor, self.model.language_model.lm_head.weight)
        loss = sail_ops.linear_cross_entropy(hidden_ND, head_VD, targets_N, reduction="sum")
        return Objective(loss, counts_ME, prob_sum_ME)


def answer_logits(
    model: SailVL2ForConditionalGeneration, batch: PackedBatch, pixel_values: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logits [N, V] and targets [N] of the labeled positions in order, counts [M, E], probability sums [M, E])."""
    hidden_ND, *rest = answer_states(model, batch, pixel_values)
    return model.language_model.lm_head(hidden_ND), *rest


def answer_states(
    model: SailVL2ForConditionalGeneration, batch: PackedBatch, pixel_values: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`answer_logits` before the head: final hidden states [N, D], which are a tenth of all positions."""
    out = model.model(
        input_ids=batch.input_ids_BL,
        pixel_values=pixel_values,
        position_ids=batch.position_ids_BL,
        pack=batch.attention,
        token_mask=batch.token_mask(),
    )
    targets = batch.labels_BL[:, 1:]
    labeled = targets != IGNORE
    counts_ME, prob_sum_ME = (torch.zeros(0, 0) if each is None else each for each in (out.counts_ME, out.prob_sum_ME))
    return out.last_hidden_state[:, :-1][labeled], targets[labeled], counts_ME, prob_sum_ME


def label_count(batch: PackedBatch) -> int:
    """Positions that the answer loss adds up."""
    return int((batch.labels_BL[:, 1:] != IGNORE).sum())


def balance_losses(counts_ME: Tensor, prob_sum_ME: Tensor, num_tokens: int, group: dist.ProcessGroup | None) -> Tensor:
    """E * sum_e f_e P_e of each expert layer, over the tokens of all ranks of `group`; fp32 [M].

    A balanced layer scores K (experts a token), one that always picks the same K experts up to E. The layers stay
    apart: pooled, layers that each collapsed onto other experts would look balanced.
    Source: SAIL-VL2 report, section 2.2 ("average activation across ranks").
    """
    layers = [
        sail_ops.load_balancing_loss(counts_E, sum_E, num_tokens, group=group)
        for counts_E, sum_E in zip(counts_ME, prob_sum_ME, strict=True)
    ]
    return torch.stack(layers) if layers else torch.zeros(0)
