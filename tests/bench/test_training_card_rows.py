"""The card's rows of training on a CPU, tiny: every way to train, what is on disk and when, memory that comes back."""

import json
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import DEVICE

pytest.importorskip("pytest_benchmark")
pytest.importorskip("deepspeed")

from benchmarks import bench_training_cuda, events, journal, rows, stock, tables
from benchmarks.bench_training_cuda import CASES, CardTraining, config_of, made_batches, sized
from training import metrics, parallel

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the benchmarks' own arithmetic")


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("SAIL_BENCH_SIZE", "tiny")
    monkeypatch.setattr(events, "DEVICE", "cpu")
    monkeypatch.setattr(bench_training_cuda, "ROUNDS", 1)
    monkeypatch.setattr(metrics, "peak_flops", lambda dtype: 1e12)
    monkeypatch.setattr(parallel, "choose", lambda name=None: parallel.KINDS["cpu"])
    journal.start(lambda: (tmp_path, {"machine_info": {}}))
    yield
    journal.start(None)
    parallel.stop_processes()


class Benchmark(SimpleNamespace):
    """What the fixture of pytest-benchmark does for a card's row."""

    def pedantic(self, function: Callable[..., None], arguments: tuple[str], rounds: int) -> None:
        start = time.perf_counter()
        function(*arguments)
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[time.perf_counter() - start]))


def row(name: str, lines: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a case records, and the lines that it left while it ran."""
    benchmark = Benchmark(name=name, extra_info={})
    bench_training_cuda.test_training_step(benchmark, name)
    text = (lines / "training.partial.jsonl").read_text()
    return benchmark.extra_info, [json.loads(line) for line in text.splitlines()[1:]]


@pytest.mark.parametrize("name", CASES)
def test_every_way_learns_the_same_and_is_kept_at_once(name: str, tmp_path: Path) -> None:
    found, lines = row(name, tmp_path)
    names = CASES[name].names
    assert [list(line["extra_info"]["ms"]) for line in lines] == [list(names[: n + 1]) for n in range(len(names))]
    assert [line["state"] for line in lines] == ["ours alone"] + ["in part"] * (len(names) - 1)
    losses = torch.tensor([found["loss"][way] for way in names], dtype=torch.bfloat16)
    torch.testing.assert_close(losses, losses[:1].expand_as(losses))
    experts = {"experts": "grouped_mm"} if "stock eager" in names else {}
    assert found["stock"] == {"attention": "sdpa", **experts}
    assert found["work"]["stock padded"]["rows"] > found["work"]["sail"]["rows"] == 4
    assert all(0 < found["update_ms"][way] < found["ms"][way] and 0 < found["mfu"][way] < 1 for way in names)
    table = tables.training_table({"benchmarks": [{"extra_info": found}]})
    assert f"a step of 2 layers of {CASES[name].preset}" in table and "| MFU " in table and "update, ms" in table


def test_a_step_that_fails_ends_its_side_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After half a step the engine's count of micro-batches is off: nothing is timed with it any more."""
    monkeypatch.setattr(rows, "failure", lambda steps, name: "out of memory")
    found, lines = row("2B", tmp_path)
    assert list(found["ms"]) == ["sail"] and found["not_measured"] == {"stock padded": "out of memory"}
    assert len(lines) == 2 and "not measured" in tables.training_table({"benchmarks": [{"extra_info": found}]})


def test_the_loop_over_experts_is_the_last_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its engine is the others', and is not set back."""
    assert [case.names.index("stock eager") for case in CASES.values() if "stock eager" in case.names] == [3]
    steps = CardTraining(sized(CASES["30B-A3B"]), "stock")
    chosen = []
    for name in CASES["30B-A3B"].names[1:]:
        steps.prepare(name)
        chosen.append(stock.implementations(steps.engine.objective)["experts"])
    steps.close()
    assert chosen == ["grouped_mm", "grouped_mm", "eager"]


def test_both_sides_begin_with_the_same_weights() -> None:
    states = []
    for side in ("sail", "stock"):
        steps = CardTraining(sized(CASES["2B"]), side)
        states.append(steps.engine.objective.get_submodule("model").state_dict())
        steps.close()
    ours, stocks = stock.to_stock(states[0]), states[1]
    assert ours.keys() == stocks.keys() and all(torch.equal(ours[key], stocks[key]) for key in ours)


def test_an_engine_that_is_closed_gives_its_memory_back() -> None:
    steps = CardTraining(sized(CASES["2B"]), "sail")
    engine: Any = steps.engine._engine
    held = [weakref.ref(what) for what in (engine, engine.optimizer, steps.engine.objective)]
    del engine
    steps.close()
    assert [what() for what in held] == [None] * 3


@pytest.mark.parametrize("name", CASES)
def test_made_batches_fill_their_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAIL_BENCH_SIZE", "full")
    case = sized(CASES[name])._replace(micro_batches=1)
    config = config_of(case)
    assert config.text_config.num_hidden_layers == case.layers and case.layers in (4, 28)
    (batch,) = made_batches(case, config)
    assert batch.input_ids_BL.shape == (case.rows, case.length) and batch.tokens == case.rows * case.length
    pictures = int((batch.input_ids_BL == config.image_token_id).sum())
    assert pictures == len(batch.pixels) * config.tokens_per_tile and batch.labels > batch.tokens // 5
    assert int(batch.input_ids_BL.max()) < config.text_config.vocab_size
