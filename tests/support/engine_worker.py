"""What the engine is asked to do in test_engine.py, and the part of it that takes two ranks, in one start:

    torchrun --nproc_per_node=2 engine_worker.py FOLDER

FOLDER gets results.json, by case, and checkpoints and exports; FOLDER/alone-* are checkpoints of one process, to go on
from. One process alone after the other, an engine of each case takes over from the one before.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from tiny_model import lively_model, pixels, prompt, tiny_config
from torch import Tensor

import sail_ops
from training import parallel
from training.data.batch import Batch, Row, collate, lay_out
from training.data.sample import IGNORE, Sample
from training.engines.deepspeed import DeepSpeedEngine
from training.objectives.supervised import Supervised
from training.recipes import Recipe
from training.run import prepare

EXPERTS, STEPS, RANKS, SAVED, PAD = 8, 20, 2, 4, 0
BASE = Recipe(streams=2, lr=1e-3, balance=0.1, vision_lr=0.5, weight_decay=0.05, offload=False)
FROZEN = replace(BASE, train="adapter")
ACCUMULATED = replace(BASE, streams=4, micro_batches=2)
LORA = replace(BASE, lora_rank=2, lora_alpha=4.0)
PARITY = {
    **{f"zero-{stage}": replace(BASE, zero_stage=stage) for stage in range(4)},
    **{f"zero-{stage}-offload": replace(BASE, zero_stage=stage, offload=True) for stage in (2, 3)},
    **{f"frozen-{stage}": replace(FROZEN, zero_stage=stage) for stage in (0, 2, 3)},
    **{f"accumulated-{stage}": replace(ACCUMULATED, zero_stage=stage) for stage in (0, 1, 3)},
    "lora-2": replace(LORA, offload=True),
}
SHORT = {  # train, save, go on; under another stage too
    **{f"float32-{stage}": replace(BASE, zero_stage=stage, offload=stage > 1) for stage in range(4)},
    **{
        f"bfloat16-{stage}": replace(
            BASE, zero_stage=stage, dtype="bfloat16", train="adapter,language", offload=stage > 1
        )
        for stage in (1, 2, 3)
    },
}
ALONE = {"alone-0": SHORT["float32-0"], "alone-2": SHORT["float32-2"]}
WRONG = ("a gradient left out", "a balance loss of one rank", "the labels of one rank")


def row_of(number: int, step: int, rank: int) -> Row:
    """One conversation. Every fourth step the second rank sees no picture, then none does, then it learns nothing."""
    tiles = 0 if (step % 4, rank) in ((1, 1), (2, 0), (2, 1)) else 1
    ids = prompt(tiles, 9 + number % 5, seed=number).numpy().astype(np.int32)
    start = len(ids) if (step % 4, rank) == (3, 1) else 4 * tiles + 3
    labels = np.where(np.arange(len(ids)) < start, IGNORE, ids).astype(np.int32)
    return lay_out([Sample(ids, labels)], pixels(tiles, seed=number))


def rows_of(step: int, rank: int, micro_batches: int) -> list[Row]:
    """A row for each of a rank's micro-batches."""
    return [row_of((step * micro_batches + n) * RANKS + rank, step, rank) for n in range(micro_batches)]


@contextmanager
def reaching(experts: Iterable[int]) -> Iterator[None]:
    """Routers choose among these alone."""
    route_topk, bias_E = sail_ops.route_topk, torch.full((EXPERTS,), -1e4)
    bias_E[list(experts)] = 0
    chosen: Any = lambda logits_TE, k, **options: route_topk(logits_TE, k, bias_E=bias_E, **options)  # noqa: E731
    with patch.object(sail_ops, "route_topk", chosen):
        yield


def own(rank: int) -> Iterable[int]:
    """Three experts of this rank alone; a fourth is reached by none."""
    return range(rank * 4, rank * 4 + 3)


def shared(rank: int) -> Iterable[int]:
    """The same for all."""
    return range(6)


def steps_of(recipe: Recipe) -> int:
    """All where everything is trained at once, fewer of the others."""
    return STEPS if recipe.parts == BASE.parts and recipe.micro_batches == 1 and not recipe.lora_rank else 8


def learning_rate(step: int) -> float:
    """Of a step."""
    return 1e-3 * (1 - step / (2 * STEPS))


def supervised(recipe: Recipe) -> Supervised:
    """The tiny model as the recipe trains it; equal on every call."""
    model = lively_model(tiny_config(moe=True, num_hidden_layers=2))
    torch.manual_seed(recipe.seed)  # of LoRA's factors
    prepare(model, recipe)
    return Supervised(model)


def engine_of(recipe: Recipe) -> DeepSpeedEngine:
    """An engine around a model of its own."""
    return DeepSpeedEngine(supervised(recipe), recipe)


def batches(step: int, recipe: Recipe) -> list[Batch]:
    """Of this rank; one process takes both ranks' rows together."""
    ranks = [parallel.rank()] if parallel.world() == RANKS else range(RANKS)
    rows = zip(*(rows_of(step, rank, recipe.micro_batches) for rank in ranks), strict=True)
    return [collate(micro_batch, PAD) for micro_batch in rows]


def train(engine: DeepSpeedEngine, steps: Iterable[int], experts: Any = shared) -> list[dict[str, Any]]:
    """What each step gave."""
    found = []
    with reaching(experts(parallel.rank())):
        for step in steps:
            result = engine.train_step(batches(step, engine.recipe), learning_rate(step))
            found.append(result._asdict() | {"counts_ME": result.counts_ME.tolist()})
    return found


def held(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """Copies of this rank's fragments: masters, moments, weights."""
    parts = ((f"{kind}/{part.name}", values) for part in engine._fragments() for kind, values in part.values.items())
    return {key: values.detach().clone() for key, values in parts}


def adam_steps(engine: DeepSpeedEngine) -> list[int]:
    """What AdamW counts, over all of its states."""
    adam = engine._engine.optimizer if engine.recipe.zero_stage == 0 else engine._engine.optimizer.optimizer
    return sorted({int(state["step"]) for state in adam.state.values()})


def parity(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """All steps; then a checkpoint, and an export as Hugging Face loads it."""
    engine = engine_of(recipe)
    steps = train(engine, range(steps_of(recipe)), own)
    engine.save(folder / "engine")
    weights = engine.weights()
    model = engine.objective.model
    whole = model.state_dict() if recipe.zero_stage < 3 and parallel.is_first() else {}
    same = all(torch.equal(weights[key], value) for key, value in whole.items())
    if parallel.is_first() and not recipe.lora_rank:
        model.save_pretrained(folder / "model", state_dict=weights)
    engine.close()
    return {"steps": steps, "exported": [len(weights)], "same_as_module": same}


def short(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Some steps, a checkpoint, some steps more."""
    engine = engine_of(recipe)
    steps = train(engine, range(SAVED))
    engine.save(folder / "engine")
    counted = adam_steps(engine)
    types = sorted({str(value.dtype) for key, value in held(engine).items() if "vision_model" not in key})
    weights = engine.weights()
    if parallel.is_first():
        torch.save(weights, folder / "weights.pt")
    steps += train(engine, range(SAVED, SAVED + 4))
    engine.close()
    return {"steps": steps, "types": types, "adam_steps": counted}


def resumed(recipe: Recipe, start: Path, folder: Path) -> dict[str, Any]:
    """Go on from a checkpoint, after writing it once more."""
    engine = engine_of(recipe)
    torch.manual_seed(999 + parallel.rank())
    engine.load(start / "engine")
    random, counted = torch.rand(1).item(), adam_steps(engine)
    engine.save(folder / "engine")
    steps = train(engine, range(SAVED, SAVED + 4))
    engine.close()
    return {"steps": steps, "random": parallel.gather_objects(random), "adam_steps": counted}


def not_finite(recipe: Recipe, where: str) -> dict[str, Any]:
    """A step whose second rank has NaN among its pixels, or in its loss: what it changed, and the steps behind it."""
    engine = engine_of(recipe)
    good = train(engine, [0])
    before = held(engine)
    forward = Supervised.forward

    def spoiled(self: Supervised, batch: Batch) -> Any:
        if parallel.rank() == 1 and where == "pixels":
            batch.pixels[0, 0, 0, 0] = torch.nan
        out = forward(self, batch)
        # a gradient that is finite all the same
        return out._replace(loss_sum=out.loss_sum + torch.nan) if parallel.rank() == 1 and where == "loss" else out

    with patch.object(Supervised, "forward", spoiled):
        bad = train(engine, [4])
    after = held(engine)
    equal = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    finite = [bool(np.isfinite(bad[0]["grad_norm"])), bad[0]["finite"]]
    good += train(engine, range(1, 4))
    engine.close()
    return {
        "steps": good,
        "finite": parallel.gather_objects(finite),
        "unchanged": parallel.gather_objects(equal),
        "counted": engine.steps,
    }


@contextmanager
def wrong(fault: str) -> Iterator[None]:
    """A mistake in the arithmetic over ranks."""
    forward, sum_over_ranks, balance = Supervised.forward, parallel.sum_over_ranks, sail_ops.load_balancing_loss

    def left_out(self: Supervised, batch: Batch) -> Any:
        out = forward(self, batch)
        return out._replace(loss_sum=out.loss_sum.detach() + 0 * out.loss_sum) if parallel.rank() else out

    with {
        WRONG[0]: patch.object(Supervised, "forward", left_out),
        WRONG[1]: patch.object(sail_ops, "load_balancing_loss", lambda *args, group: balance(*args)),
        WRONG[2]: patch.object(parallel, "sum_over_ranks", lambda v: v if len(v) == 1 else sum_over_ranks(v)),
    }[fault]:
        yield


def mistaken(fault: str) -> dict[str, Any]:
    """Steps with a mistake."""
    engine = engine_of(PARITY["zero-2"])
    with wrong(fault):
        steps = train(engine, range(4), own)
    engine.close()
    return {"steps": steps}


def main(folder: Path) -> None:
    """All cases, one after the other."""
    torch.set_num_threads(1)
    parallel.start_processes("cpu")
    found = {name: parity(recipe, folder / name) for name, recipe in PARITY.items()}
    found |= {name: short(recipe, folder / name) for name, recipe in SHORT.items()}
    for name, start in resumptions():
        found[f"{name} from {start}"] = resumed(SHORT[name], folder / start, folder / f"{name}-from-{start}")
    for stage in range(4):
        for where in ("pixels", "loss"):
            recipe = replace(BASE, zero_stage=stage, offload=stage > 1)
            found[f"not finite {where} {stage}"] = not_finite(recipe, where)
        good = engine_of(recipe)
        found[f"finite {stage}"] = {"steps": train(good, range(4))}
        good.close()
    found |= {fault: mistaken(fault) for fault in WRONG}
    if parallel.is_first():
        (folder / "results.json").write_text(json.dumps(found))
    parallel.barrier()
    parallel.stop_processes()


def resumptions() -> list[tuple[str, str]]:
    """(case, checkpoint it goes on from): each its own and the next one's; the first two also one process's."""
    found = [*zip(SHORT, SHORT, strict=True)]
    for dtype in ("float32", "bfloat16"):
        names = [name for name in SHORT if name.startswith(dtype)]
        found += zip(names, names[1:] + names[:1], strict=True)
    return found + [("float32-1", "alone-0"), ("float32-3", "alone-2")]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
