"""A row on a card: ours first and kept at once, slow peers once, the kernels that ran; what a killed run leaves."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")
pytest.importorskip("transformers")

from benchmarks import card_page, conftest, events, journal, kernels, report, rows

ROW = {"family": "moe", "kind": "train", "case": {"T": 3}}
FACTS = {"machine_info": {"device": "cuda-a-card"}, "datetime": "2026-01-01T00:00:00"}


class Steps:
    """Says who ran; "killed" ends the process as a signal would."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def prepare(self, name: str) -> None: ...

    def run(self, name: str) -> None:
        self.ran.append(name)
        if name == "killed":
            raise KeyboardInterrupt
        if name == "refused":
            raise RuntimeError("not here")


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setattr(events, "DEVICE", "cpu")
    monkeypatch.setattr(events, "Events", events.WallClock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    journal.start(lambda: (tmp_path / "cuda-a-card", FACTS))
    yield
    journal.start(None)


def fixture(name: str) -> Any:
    return SimpleNamespace(name=name, extra_info={}, pedantic=lambda function, setup, rounds: (setup(), function()))


def left(folder: Path) -> dict[str, Any]:
    return journal.read(folder / "cuda-a-card" / "moe.partial.jsonl")


def test_ours_is_timed_alone_and_kept_before_any_peer(tmp_path: Path) -> None:
    steps, benchmark = Steps(), fixture("one")
    with pytest.raises(KeyboardInterrupt):
        rows.measure(benchmark, steps, ["peer", "killed"], budget=0.0, row=ROW)
    assert set(steps.ran[:-2]) == {"sail"} and steps.ran[-2:] == ["peer", "killed"]
    found = left(tmp_path)
    assert found["partial"] is True and found["machine_info"] == FACTS["machine_info"]
    (row,) = found["benchmarks"]
    assert row["name"] == "one" and row["state"] == "ours alone" and row["extra_info"]["ms"].keys() == {"sail"}


def test_a_slow_peer_has_one_turn_outside_of_the_rounds() -> None:
    steps = Steps()
    samples, facts = rows.measure(fixture("one"), steps, ["peer", "stock_eager", "refused"], budget=0.0, row=ROW)
    assert {name: len(times) for name, times in samples.items()} == {"sail": 3, "peer": 3, "stock_eager": 1}
    assert list(samples)[0] == "sail", "what ratios are over"
    assert steps.ran.count("stock_eager") == 2, "one that shows whether it runs, one that is timed"
    assert facts["not_measured"] == {"refused": "RuntimeError: not here"}
    assert facts["kernels"].keys() == samples.keys() and facts["family"] == "moe"


def test_a_run_that_was_killed_is_no_result(tmp_path: Path) -> None:
    """Half a line at the end is left out; report says that it ended early, and takes no family's table from it."""
    for name in ("one", "two"):
        journal.write(name, ROW | {"ms": {"sail": 2.0}, "speedup": {}}, "ours alone")
    info = ROW | {"ms": {"sail": 1.0}, "speedup": {"grouped_mm": 3.0}}
    journal.write("one", info, "whole")
    path = tmp_path / "cuda-a-card" / "moe.partial.jsonl"
    with path.open("a") as file:
        file.write('{"name": "three", "sta')
    assert [(row["name"], row["state"]) for row in left(tmp_path)["benchmarks"]] == [
        ("one", "whole"),
        ("two", "ours alone"),
    ]
    assert report.kept("cuda-a-card") == {}
    page = report.page()
    assert "### A run of moe that ended early" in page and "| 3.00 grouped_mm |" in page and "3x?" not in page
    path.write_text('{"par')
    assert journal.read(path) == {"partial": True, "benchmarks": []}


def test_whole_results_take_the_place_of_what_was_kept_row_by_row(tmp_path: Path) -> None:
    info = ROW | {"ms": {"sail": 1.0}, "speedup": {}}
    journal.write("one", info, "whole")
    results = {"benchmarks": [{"extra_info": info}], "machine_info": {"device": "cuda-a-card", "card": {}}}
    (path,) = conftest.keep(results)
    assert [p.name for p in path.parent.iterdir()] == ["moe.json"] and "partial" not in json.loads(path.read_text())


@pytest.mark.parametrize("failed", [False, True])
def test_a_row_is_whole_when_its_test_has_passed(tmp_path: Path, failed: bool) -> None:
    benchmark = fixture("one")
    benchmark.extra_info |= ROW | {"ms": {"sail": 1.0}, "speedup": {}}
    journal.write("one", benchmark.extra_info, "ours alone")
    hook = conftest.pytest_runtest_call(SimpleNamespace(name="one", funcargs={"benchmark": benchmark}))
    next(hook)
    with pytest.raises(StopIteration):
        hook.send(SimpleNamespace(excinfo=RuntimeError if failed else None))
    assert left(tmp_path)["benchmarks"][0]["state"] == ("ours alone" if failed else "whole")


def test_runs_of_no_card_keep_nothing_row_by_row(tmp_path: Path) -> None:
    journal.start(None)
    journal.write("one", ROW, "whole")
    assert list(tmp_path.iterdir()) == []


# ---- kernels
def event(name: str, start: float, end: float) -> Any:
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end))


ROWS_KERNEL = (
    "void sail::cuda::sm90::rows_kernel<__nv_bfloat16, (sail::cuda::Layout)0, sail::cuda::StoreRowsEpilogue<"
    "__nv_bfloat16, true> >(sail::cuda::sm90::RowsArguments<sail::cuda::StoreRowsEpilogue<__nv_bfloat16, true> >)"
)


def test_a_steps_kernels_are_those_after_the_wait() -> None:
    found = [
        event("void at::native::vectorized_elementwise_kernel<4>(int)", 0, 100),
        event("at::cuda::(anonymous namespace)::spin_kernel(long)", 100, 1100),
        event("Memset (Device)", 1100, 1101),
        event("void sail::cuda::(anonymous namespace)::f<(anonymous namespace)::A>(int)", 1250, 1300),
        event(ROWS_KERNEL, 1110, 1210),
    ]
    first, second = kernels.after_spin(found)
    assert (first.symbol, second.symbol) == (
        ROWS_KERNEL.removeprefix("void ").partition("(sail::cuda::sm90::RowsArguments")[0],
        "sail::cuda::(anonymous namespace)::f<(anonymous namespace)::A>",
    )
    assert [*first[1:], *second[1:]] == pytest.approx([0.0, 0.1, 0.14, 0.19])
    assert kernels.after_spin([]) == []


def test_launches_are_medians_of_sessions_that_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.launches(Steps(), "sail") == [] and kernels.names(Steps(), "sail") == []
    sessions = iter([[("a", 0, 1), ("b", 1, n), ("a", n, n + 1)] for n in (9, 5, 7)] + [[("a", 0, 1)], [], []])
    monkeypatch.setattr(kernels, "session", lambda *_: [kernels.Launch(*launch) for launch in next(sessions)])
    assert kernels.launches(Steps(), "sail") == [("a", 0, 1), ("b", 1, 7), ("a", 7, 8)]
    with pytest.raises(RuntimeError, match="launches of 'sail' differ from one step to the next"):
        kernels.launches(Steps(), "sail")
    sessions = iter([[("a", 0, 1)]] * 2 + [[]] * 2 + [[("b", 0, 1)]])
    found = kernels.facts(Steps(), ["sail", "peer"])
    assert found["kernels"] == {"sail": ["a"], "peer": ["b"]} and found["launches"] == {}
    assert found["kernels_failed"].keys() == {"sail"}, "the row keeps its times"
    monkeypatch.setattr(kernels, "session", lambda *_: [kernels.Launch(n, 0, 1) for n in "aba"])
    assert kernels.names(Steps(), "sail") == ["a", "b"]


def test_headlines_of_a_check_are_on_the_page(tmp_path: Path) -> None:
    folder = tmp_path / "cuda-a-card"
    folder.mkdir()
    measured = {"name": "headline", "case": "experts T8192 train", "speedup": {"grouped_mm": 3.5}, "partial": True}
    lines = [{"run": {"commit": "0123456789abc", "date": "2026-01-02T03"}}, {"stage": "contact"}, measured]
    (folder / "headlines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = "\n".join(card_page.parts(folder, {}))
    assert "3.50x" in text and "Commit 0123456789, 2026-01-02, cut short." in text
    assert "No prediction is kept for cuda-a-card." in text
