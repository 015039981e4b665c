"""A training step of the released sizes on an NVIDIA card, beside the same model of transformers' own modules.

As bench_training.py, by DeepSpeed's ZeRO-2 with offload, in bfloat16, on batches that are made here: samples of a
picture and text whose lengths are uniform. Ours ("sail") takes them as packs. "stock padded" has a sample a row, "stock
packed" the same packs under a mask, and "stock eager" these with transformers' loop over experts in place of
`grouped_mm`: the baseline of "3x". The update on the host is timed apart, as all have it alike.

Two engines' optimizer states are more than such a machine's memory: ours is measured, kept and given up before stock's
is made, so that they take no turns. B rows, L tokens of the longest of them.
"""

import gc
import time
from collections.abc import Iterator
from contextlib import closing
from importlib.metadata import version
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

pytest.importorskip("deepspeed", reason="trained by DeepSpeed: pip install 'sail-ops[train]'")

from benchmarks import events, harness, journal, rows, stock
from benchmarks.cases import size_name
from sail_model import SailVL2Config, SailVL2ForConditionalGeneration
from training import metrics
from training.data.batch import Batch, Row, collate, lay_out
from training.data.sample import IGNORE, Sample
from training.engines.deepspeed import DeepSpeedEngine
from training.objectives.supervised import Supervised
from training.recipes import Recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
RATE = 1e-12  # below a weight's last bit
ROUNDS = 2  # of a way to train, after a first step; one takes seconds, and all rows have five minutes
PAD = 0


class Case(NamedTuple):
    """A model of the zoo with its first `layers`; micro-batches of a step, rows of each, tokens of a row."""

    preset: str
    layers: int
    micro_batches: int
    rows: int
    length: int
    names: tuple[str, ...]


DENSE = ("sail", "stock padded", "stock packed")
CASES = {
    "30B-A3B": Case("SAIL-VL2-30B-A3B", 4, 4, 2, 4096, (*DENSE, "stock eager")),
    "2B": Case("SAIL-VL2-2B", 28, 4, 1, 4096, DENSE),
}
TINY_VISION = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TINY_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "pad_token_id": PAD,
    "eos_token_id": 1,
}
TINY_EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def sized(case: Case) -> Case:
    """The case, or a tiny one of its kind."""
    return case if size_name() == "full" else case._replace(layers=2, micro_batches=2, rows=2, length=96)


def config_of(case: Case) -> SailVL2Config:
    """The preset's with so many layers; tiny, widths and vocabulary too."""
    whole = SailVL2Config.from_preset(case.preset)
    text = whole.text_config.to_dict() | {"num_hidden_layers": case.layers}
    text.pop("layer_types", None)  # one for each layer, of a dense model
    if size_name() == "full":
        return SailVL2Config(vision_config=whole.vision_config, text_config=text)
    text |= TINY_TEXT | (TINY_EXPERTS if text["model_type"] == "qwen3_moe" else {})
    return SailVL2Config(vision_config=TINY_VISION, text_config=text, image_token_id=511)


def made_batches(case: Case, config: SailVL2Config) -> list[Batch]:
    """The micro-batches of a step: rows that samples of one to four times a picture's tokens fill."""
    random = np.random.default_rng(0)
    return [
        collate([made_row(random, config, case.length) for _ in range(case.rows)], PAD)
        for _ in range(case.micro_batches)
    ]


def made_row(random: np.random.Generator, config: SailVL2Config, length: int) -> Row:
    """Samples of a picture and text, the second half of whose text is learned; the last one takes what is left."""
    picture, samples, left = config.tokens_per_tile, [], length
    while left:
        size = int(random.integers(picture + 8, 4 * picture))
        size = left if left - size < picture + 8 else size
        ids = random.integers(1, config.image_token_id, size, dtype=np.int32)
        ids[1 : 1 + picture] = config.image_token_id
        learned = np.arange(size) >= (1 + picture + size) // 2
        samples.append(Sample(ids, np.where(learned, ids, IGNORE).astype(np.int32)))
        left -= size
    side = config.vision_config.image_size
    pixels = torch.from_numpy(random.standard_normal((len(samples), 3, side, side), dtype=np.float32))
    return lay_out(samples, pixels)


class CardTraining:
    """The engine of one side, ours or stock's, and a step's micro-batches of every way to train it."""

    def __init__(self, case: Case, side: str) -> None:
        self.case, self.side, self.config = case, side, config_of(case)
        micro_batches = case.micro_batches
        self.recipe = Recipe(streams=case.rows * micro_batches, micro_batches=micro_batches, dtype="bfloat16")
        self.packs = made_batches(case, self.config)
        model = self._ours()
        self.flops = sum(
            metrics.FlopCount(model, self.config).step(b.tokens, b.labels, b.pairs, len(b.pixels)) for b in self.packs
        )
        objective: nn.Module = Supervised(model.train())
        if side == "stock":
            objective = stock.StockSupervised(self._stock(model.state_dict()).train())
        del model
        self.engine = DeepSpeedEngine(objective, self.recipe)
        self.updates: list[float] = []  # seconds
        self._time_updates()

    def _ours(self) -> SailVL2ForConditionalGeneration:
        """With the same weights whenever it is made."""
        torch.manual_seed(0)
        with torch.device(events.DEVICE):
            return SailVL2ForConditionalGeneration(self.config).bfloat16()

    def _stock(self, state: dict[str, Tensor]) -> nn.Module:
        with torch.device(events.DEVICE):
            return stock.stock_model(self.config, state).bfloat16()

    def _time_updates(self) -> None:
        optimizer: Any = self.engine._engine.optimizer
        update = optimizer.step

        def timed(*arguments: Any, **named: Any) -> None:
            synchronize()
            start = time.perf_counter()
            update(*arguments, **named)
            synchronize()
            self.updates.append(time.perf_counter() - start)

        optimizer.step = timed

    def prepare(self, name: str) -> None:
        """The micro-batches of that way to train; from "stock eager" on the loop over experts."""
        self.batches: list[Any] = [self._batch(name, pack) for pack in self.packs]
        if name == "stock eager":
            model: Any = self.engine.objective.get_submodule("model")
            model.set_experts_implementation("eager")

    def run(self, name: str) -> None:
        """One step to its end, and what it gave."""
        self.result = self.engine.train_step(self.batches, RATE)
        synchronize()

    def close(self) -> None:
        """Give all memory back, the pinned too."""
        self.engine.close()
        del self.engine
        gc.collect()
        if events.DEVICE == "cuda":
            torch.cuda.empty_cache()
            torch._C._host_emptyCache()

    def _batch(self, name: str, pack: Batch) -> Batch | stock.StockBatch:
        if self.side == "sail":
            return pack
        if name == "stock padded":
            return stock.padded(stock.question_rows(pack, self.config.tokens_per_tile, self.config.image_token_id, PAD))
        return stock.packed(pack)


def synchronize() -> None:
    """What the device was given has ended."""
    if events.DEVICE == "cuda":
        torch.cuda.synchronize()


def measured(steps: CardTraining, seconds: list[float]) -> dict[str, Any]:
    """Of a step of that way to train: what went through, loss, MFU, the update's share, the most that was held."""
    through = [stock.work(batch) for batch in steps.batches]
    return {
        "work": {key: sum(each[key] for each in through) for key in through[0]},
        "loss": steps.result.loss,
        "mfu": steps.flops / median(seconds) / metrics.peak_flops("bfloat16"),
        "update_ms": 1e3 * median(steps.updates),
        "peak_bytes": metrics.peak_memory(),
    }


def ways(benchmark: BenchmarkFixture, case: Case, side: str) -> Iterator[tuple[str, list[float], dict[str, Any]]]:
    """(name, seconds of every round, facts) of each way to train that side; a step that failed ends them."""
    with closing(CardTraining(case, side)) as steps:
        for name in (name for name in case.names if name.split()[0] == side):
            if reason := first_step(steps, name):
                yield name, [], {"not_measured": reason}
                return
            steps.updates.clear()
            if events.DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = timed(benchmark, steps, name)
            facts = measured(steps, seconds)
            if name == "stock padded":
                facts["stock"] = stock.implementations(steps.engine.objective)
            yield name, seconds, facts


def first_step(steps: CardTraining, name: str) -> str:
    """It also allocates, tunes, and makes the optimizer's state. Why a peer's does not run here; "" if it does."""
    if steps.side == "stock":
        return rows.failure(steps, name)
    steps.prepare(name)
    steps.run(name)
    return ""


def timed(benchmark: BenchmarkFixture, steps: CardTraining, name: str) -> list[float]:
    """Seconds of every round by the wall clock, as the update is the host's; ours are pytest-benchmark's own too."""
    if steps.side == "stock":
        return [harness.timed(steps, name) for _ in range(ROUNDS)]
    benchmark.pedantic(steps.run, (name,), rounds=ROUNDS)
    found: Any = benchmark.stats
    return list(found.stats.data)


def row_of(case: Case, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The row of what was measured until now: every fact by name."""
    facts: dict[str, Any] = {"stock": {}, "not_measured": {}}
    for name, of_name in found.items():
        facts["stock"] |= of_name.get("stock", {})
        for key in of_name.keys() - {"stock"}:
            facts.setdefault(key, {})[name] = of_name[key]
    described = {"model": f"{case.layers} layers of {case.preset}", "dtype": "bfloat16", **case._asdict()}
    return {"family": "training", "kind": "train", "case": described, "deepspeed": version("deepspeed"), **facts}


@pytest.mark.timeout(280)  # gpu-check's limit is that of a test of operators
@pytest.mark.parametrize("name", CASES)
def test_training_step(benchmark: BenchmarkFixture, name: str) -> None:
    """Ours, kept at once; then stock's ways, each kept when it is there."""
    case = sized(CASES[name])
    samples: dict[str, list[float]] = {}
    found: dict[str, dict[str, Any]] = {}
    for side in ("sail", "stock"):
        for way, seconds, facts in ways(benchmark, case, side):
            found[way] = facts
            samples |= {way: seconds} if seconds else {}
            harness.record(benchmark, samples, **row_of(case, found), **events.state())
            journal.write(benchmark.name, benchmark.extra_info, "ours alone" if side == "sail" else "in part")
