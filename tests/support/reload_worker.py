"""Two ranks under ZeRO-3 go back to a checkpoint within a run, and from it in a new engine: their losses, as JSON.

torchrun --nproc_per_node=2 reload_worker.py FOLDER
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tiny_model import lively_model, pixels, prompt, tiny_config

from training import parallel
from training.data.batch import collate, lay_out
from training.data.sample import Sample
from training.engines.deepspeed import DeepSpeedEngine
from training.objectives.supervised import Supervised
from training.recipes import Recipe

RECIPE = Recipe(zero_stage=3, streams=2, offload=False)


def engine_of(seed: int) -> DeepSpeedEngine:
    """Around a model of its own."""
    return DeepSpeedEngine(Supervised(lively_model(tiny_config(moe=True), seed).train()), RECIPE)


def losses(engine: DeepSpeedEngine, steps: Iterable[int]) -> list[float]:
    """Of these steps; each rank has a conversation of its own in each."""
    found = []
    for step in steps:
        seed = 2 * step + parallel.rank()
        ids = prompt(1, 12, seed).numpy().astype(np.int32)
        labels = np.where(np.arange(len(ids)) < 8, -100, ids).astype(np.int32)
        batch = collate([lay_out([Sample(ids, labels)], pixels(1, seed))], pad_id=0)
        found.append(engine.train_step([batch], lr=1e-2).loss)
    return found


def main(folder: Path) -> None:
    """Three steps, a checkpoint, three more; these three again from it, twice."""
    parallel.start_processes("cpu")
    engine = engine_of(seed=0)
    losses(engine, range(3))
    engine.save(folder / "engine")
    parallel.barrier()
    found = {"went on": losses(engine, range(3, 6))}
    engine.load(folder / "engine")
    found["went back"] = losses(engine, range(3, 6))
    engine.close()
    engine = engine_of(seed=1)
    engine.load(folder / "engine")
    found["resumed"] = losses(engine, range(3, 6))
    engine.close()
    if parallel.is_first():
        (folder / "losses.json").write_text(json.dumps(found), encoding="utf-8")
    parallel.stop_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
