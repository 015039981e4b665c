"""A training step of the demo's model on the demo's mixture, beside the same model of transformers' own modules.

A step is forward, backward and optimizer (AdamW under ZeRO-2 with offload), all by `DeepSpeedEngine`, float32, one
process. Ours ("sail") takes packs in which a picture's questions are branches. "Padded" are the same answers a question
a row, its picture encoded again, by our modules and by stock's; "stock packed" the same packs under a mask. Weights are
the same fresh ones, and stay so: the rate is too small to move them; tokens are those of the packs, so that tokens/s
compare times on the same content. Our steps have a load-balancing loss, of which stock's have none.
"""

import copy
from contextlib import closing
from dataclasses import replace
from importlib.metadata import version
from itertools import count
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

pytest.importorskip("deepspeed", reason="trained by DeepSpeed: pip install 'sail-ops[train]'")
pytest.importorskip("easy_vqa", reason="trained on easy-vqa: pip install 'sail-ops[train]'")

from benchmarks import harness, loopback, stock, wire
from benchmarks.cases import size_name
from benchmarks.worker import Worker
from sail_model.tokenizer import IMAGE_CONTEXT
from training import parallel
from training.assemble import assemble, open_loader, open_samples
from training.catalog import DEMO
from training.data.batch import Batch
from training.engines.deepspeed import DeepSpeedEngine
from training.objectives.supervised import Supervised
from training.recipes import Recipe

NAMES = ("sail", "sail padded", "stock padded", "stock packed")
BUDGET = {"full": 24.0, "tiny": 0.05}
POOL = {"full": 4, "tiny": 1}  # steps of data, taken by turns
RATE = 1e-12  # below a weight's last bit


def recipe(size: str) -> Recipe:
    """The demo's stage on all questions; "tiny": a row of the split held out, which is smaller."""
    (found,) = (stage for stage in DEMO if stage.data == "easy_vqa")
    found = replace(found, workers=0, test="")
    return found if size == "full" else replace(found, data="easy_vqa:test", streams=1, stream_length=160)


class TrainingSteps:
    """Engines and steps of data. Both batches of a side, ours or stock's, have one engine."""

    def __init__(self, size: str) -> None:
        self.recipe = recipe(size)
        self.parts = assemble(self.recipe)
        self.state = copy.deepcopy(self.parts.model.state_dict())
        self.packs = self._packs(POOL[size])
        self.engines: dict[str, DeepSpeedEngine] = {}
        self.batches: dict[str, list[Any]] = {}
        self.turns = {name: count() for name in NAMES}
        self.losses: dict[str, dict[int, float]] = {name: {} for name in NAMES}  # by pack, of its last step

    def prepare(self, name: str) -> None:
        """The next step's data; an engine and all its data where it is the first time."""
        if name not in self.batches:
            self.batches[name] = [self._batch(name, pack) for pack in self.packs]
            if (side := name.split()[0]) not in self.engines:
                self.engines[side] = DeepSpeedEngine(self._objective(side), self.recipe)
        self.turn = next(self.turns[name]) % len(self.packs)

    def run(self, name: str) -> None:
        """One step, and what it gave."""
        self.result = self.engines[name.split()[0]].train_step([self.batches[name][self.turn]], RATE)
        self.losses[name][self.turn] = self.result.loss

    def close(self) -> None:
        """Take the engines apart."""
        for engine in self.engines.values():
            engine.close()
        parallel.stop_processes()

    def _packs(self, steps: int) -> list[Batch]:
        loader = open_loader(open_samples(self.recipe, self.parts.processor), self.recipe, self.parts.pad_id)
        return [loader.next().batches[0] for _ in range(steps)]

    def _objective(self, side: str) -> Supervised | stock.StockSupervised:
        if side == "sail":
            return Supervised(self.parts.model.train())
        return stock.StockSupervised(stock.stock_model(self.parts.model.config, self.state).train())

    def _batch(self, name: str, pack: Batch) -> Batch | stock.StockBatch:
        if name == "sail":
            return pack
        if name == "stock packed":
            return stock.packed(pack)
        processor = self.parts.processor
        image_token = processor.tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT)
        rows = stock.question_rows(pack, processor.tokens_per_tile, image_token, self.parts.pad_id)
        return rows if name == "sail padded" else stock.padded(rows)

    def work(self, name: str) -> dict[str, float]:
        """Of a step, means over the pool."""
        found = [stock.work(batch) for batch in self.batches[name]]
        return {key: sum(each[key] for each in found) / len(found) for key in found[0]}

    def loss(self, name: str) -> float:
        """Mean over the packs that a step was made of."""
        losses = self.losses[name].values()
        return sum(losses) / len(losses)


def test_training_step(benchmark: BenchmarkFixture, memory_worker: Worker) -> None:
    """The peak of memory that a step adds, in a process of its own, then times by turns."""
    size = size_name()
    memory_worker.build(TrainingSteps, size)
    peaks = {}
    for name in NAMES:
        for _ in range(2):  # the first step also makes the optimizer's state
            peaks[name] = memory_worker.call("peak_bytes", name)
    with closing(TrainingSteps(size)) as steps:
        samples = harness.interleave(benchmark, steps, "sail", list(NAMES[1:]), budget=BUDGET[size])
        harness.record(
            benchmark,
            samples,
            family="training",
            kind="train",
            case={"model": "the demo's model", "dtype": steps.recipe.dtype, "mixture": steps.recipe.data},
            deepspeed=version("deepspeed"),
            stock=stock.implementations(steps.engines["stock"].objective),
            work={name: steps.work(name) for name in NAMES},
            loss={name: steps.loss(name) for name in NAMES},
            peak_bytes=peaks,
        )


def test_bytes_on_the_wire(benchmark: BenchmarkFixture) -> None:
    """ZeRO-2 with offload beside ZeRO-3, two processes."""
    if reason := loopback.refused():
        pytest.skip(reason)
    found = benchmark.pedantic(wire.count, args=(size_name(),), rounds=1)
    benchmark.extra_info.update(
        family="training", kind="wire", case={"dtype": "bfloat16", "processes": wire.PROCESSES}, **found
    )
