"""The real trainer with its log over an engine of one weight and samples made in memory: fault handling in moments."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from memory_samples import MemorySamples
from torch import Tensor

from training import checkpoint
from training.data.batch import Batch
from training.data.loader import StreamLoader
from training.engines.engine import StepResult
from training.recipes import Recipe
from training.runlog import RunLog
from training.trainer import Place, Trainer

DATA = [{"records": 64, "sha256": "0" * 64, "weight": 1.0}]


class OneWeight:
    """An engine whose weight remembers every token that it was trained on; `not_finite` are steps, from 1 on."""

    data_rank, data_world = 0, 1

    def __init__(self, not_finite: Collection[int] = ()) -> None:
        self.weight, self.calls, self.not_finite = 1.0, 0, not_finite

    def train_step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        self.calls += 1
        labels, finite = sum(batch.labels for batch in batches), self.calls not in self.not_finite
        if finite:
            self.weight = (self.weight * 31 + float(sum(batch.input_ids_BL.sum() for batch in batches))) % 1009
        loss = self.weight if finite else float("nan")
        return StepResult(loss, labels, [1.0], torch.ones(1, 2), loss, finite)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "weight").write_text(f"{self.weight} {self.calls}")

    def load(self, folder: Path) -> None:
        weight, calls = (folder / "weight").read_text().split()
        self.weight, self.calls = float(weight), int(calls)

    def weights(self) -> dict[str, Tensor]:
        return {"weight": torch.tensor(self.weight)}

    def close(self) -> None:
        pass


def _save_nothing(folder: Path) -> None:
    folder.mkdir(exist_ok=True)


@contextmanager
def tiny_trainer(
    out: Path,
    engine: OneWeight,
    samples: MemorySamples | None = None,
    start: Path | None = None,
    data: list[dict[str, Any]] = DATA,
    **options: Any,
) -> Iterator[Trainer]:
    """One stage in `out`, from the checkpoint `start` if any; `options` are the recipe's."""
    recipe = Recipe(**{"steps": 9, "save_every": 3, "streams": 4, "candidates": 4, "log_every": 1, **options})
    loader = StreamLoader(
        samples or MemorySamples(), streams=4, capacity=60, seed=3, pad_id=0, candidates=4, workers=recipe.workers
    )
    saved = SimpleNamespace(save_pretrained=_save_nothing)
    parts: Any = SimpleNamespace(processor=saved, model=SimpleNamespace(config=saved))
    flops: Any = SimpleNamespace(step=lambda *counts: 1.0)
    saved_state = None if start is None else checkpoint.Start(start, checkpoint.read_state(start))
    done = 0 if saved_state is None else saved_state.state["total"]
    with RunLog(out, recipe.steps, done, 1, 1.0) as log:
        trainer = Trainer(Place(out, (recipe,), 0, 0), engine, loader, parts, data, flops, log)
        if saved_state is not None:
            trainer.load(saved_state)
        yield trainer
    loader.close()
