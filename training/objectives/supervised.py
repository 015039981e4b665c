"""Supervised training: cross-entropy of the labeled tokens, and the statistics for a load-balancing loss.

B streams, L tokens a stream, N labeled positions, V vocabulary, M expert layers, E experts. An engine normalizes both
terms over all ranks before gradients are averaged, so the number of processes does not change the loss.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

import sail_ops
from sail_model.model import SailVL2ForConditionalGeneration
from training.data.batch import Batch
from training.data.sample import IGNORE


class Objective(NamedTuple):
    """One micro-batch: summed loss of its labels (fp32), and `sail_ops.route_topk`'s statistics of each layer."""

    loss_sum: Tensor
    counts_ME: Tensor
    prob_sum_ME: Tensor


class Supervised(nn.Module):
    """The model and its objective as one module, for an engine to wrap: a batch in, an `Objective` out."""

    def __init__(self, model: SailVL2ForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Objective:
        """sum over labels of -log softmax(logits of the position before)[label]; padding is in no statistic."""
        hidden_ND, targets_N, counts_ME, prob_sum_ME = labeled_states(self.model, batch)
        head_VD = cast(Tensor, self.model.language_model.lm_head.weight)
        loss = sail_ops.linear_cross_entropy(hidden_ND, head_VD, targets_N, reduction="sum")
        return Objective(loss, counts_ME, prob_sum_ME)


def labeled_logits(model: SailVL2ForConditionalGeneration, batch: Batch) -> tuple[Tensor, Tensor]:
    """(logits [N, V], targets [N]) of the labeled positions, in order."""
    hidden_ND, targets_N, *_ = labeled_states(model, batch)
    return model.language_model.lm_head(hidden_ND), targets_N


def labeled_states(model: SailVL2ForConditionalGeneration, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(final hidden states [N, D] before labeled positions, targets [N], counts [M, E], probability sums [M, E])."""
    out = model.model(
        **_inputs(model, batch),
        position_ids=batch.position_ids_BL,
        pack=batch.attention,
        token_mask=batch.token_mask(),
    )
    targets_BL = batch.labels_BL[:, 1:]
    labeled = targets_BL != IGNORE
    nothing = torch.zeros(0, 0, device=labeled.device)
    statistics = (nothing, nothing) if out.counts_ME is None else (out.counts_ME, out.prob_sum_ME)
    return out.last_hidden_state[:, :-1][labeled], targets_BL[labeled], *statistics


def _inputs(model: SailVL2ForConditionalGeneration, batch: Batch) -> dict[str, Tensor]:
    """Ids and pixels. Without pictures, embeddings to which a blank tile adds 0.

    So every rank runs and differentiates the same modules, whatever its batch shows: under ZeRO a parameter that one
    rank skips gets a silently wrong gradient, and a collective that one rank leaves out of its backward hangs the rest.
    """
    if len(batch.pixels):
        return {"input_ids": batch.input_ids_BL, "pixel_values": batch.pixels}
    if not torch.is_grad_enabled():
        return {"input_ids": batch.input_ids_BL}
    blank = batch.pixels.new_zeros(1, *batch.pixels.shape[1:])
    nothing = 0.0 * model.get_image_features(blank).float().sum()
    return {"inputs_embeds": model.model.embed(batch.input_ids_BL, None) + nothing}
