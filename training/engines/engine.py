"""What the trainer asks of an engine, whatever it is built on: DeepSpeed now, Megatron-core beside it.

An engine owns the wrapped model, the optimizer and the processes' groups. The trainer knows a step, never a
micro-batch's forward or backward, so that an engine is free to send micro-batches through pipeline stages of which
some have no data and some no loss.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor

from training.data.batch import Batch


class StepResult(NamedTuple):
    """One step over all data-parallel ranks, equal on every rank."""

    loss: float  # mean over all labels of the step, without the balance loss
    labels: int
    balance_M: list[float]  # load-balancing loss of each expert layer, mean over micro-batches
    counts_ME: Tensor  # tokens that each expert got, [M, E], CPU; padding left out
    grad_norm: float  # before clipping; not finite where `finite` is False
    finite: bool  # False: loss or gradient was not; nothing was updated, on no rank


class Engine(Protocol):
    """M expert layers, E experts. Every method is called on every rank."""

    data_rank: int  # which share of the data this process reads, of `data_world`;
    data_world: int  # pipeline stages of one replica have the same

    def train_step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """One optimizer step at learning rate `lr` over this rank's micro-batches.

        Minimizes (sum of -log p over all labels of all ranks) / labels + balance * mean over micro-batches and expert
        layers of the load-balancing loss of that micro-batch on all ranks. So ranks only divide a micro-batch.
        """

    def save(self, folder: Path) -> None:
        """Weights and optimizer state, under `folder`: each rank its own part."""

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote, bit for bit. Raises InputError where that is damaged, not of this run, or of
        another number of ranks that the engine cannot redistribute; the message says what to do."""

    def weights(self) -> dict[str, Tensor]:
        """The model's whole state dict, on the CPU, on the first rank; empty on all others."""

    def close(self) -> None:
        """Let go of buffers and groups, so that the next stage's engine can take the model."""
