"""The headlines where there is no card: what fails or finds no time is named, nothing is lost. Every line runs in
tests/cuda/test_gpu_check_run.py, as gpu-check calls it."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import DEVICE

pytest.importorskip("pytest_benchmark")
pytest.importorskip("transformers")

from benchmarks import events, headlines, kernels

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the benchmarks' own arithmetic")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAIL_BENCH_SIZE", "tiny")
    monkeypatch.setattr(events, "DEVICE", "cpu")
    monkeypatch.setattr(events, "Events", events.WallClock)
    monkeypatch.setattr(headlines, "ROUND_SECONDS", 0.0)


ROW = {"family": "moe", "case": {"size": "full", "routing": "uniform", "T": 8192, "mode": "train"}}


class Steps:
    """Ours takes no time, "slow" fails, "bad" too."""

    def __init__(self, broken: str = "") -> None:
        self.broken = broken

    def prepare(self, name: str) -> None: ...

    def run(self, name: str) -> None:
        if name == self.broken:
            raise RuntimeError(f"{name} is broken")


def test_a_failing_peer_is_a_line_and_a_failure_of_ours_ends_its_case_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [
        headlines.Headline("experts one train", lambda: Steps("peer"), ["peer", "another"], ROW),
        headlines.Headline("experts two train", lambda: Steps("sail"), ["peer"], ROW),
        headlines.Headline("experts three train", lambda: Steps(), ["peer"], ROW),
    ]
    monkeypatch.setattr(headlines, "headlines", lambda tiny: iter(made))
    monkeypatch.setattr(headlines, "without_card", headlines.nullcontext)
    assert headlines.main(["--tiny", "--out", str(tmp_path / "out.jsonl")]) == 1
    found = [
        (line["case"].split()[1], line["implementation"], *line.keys() & {"ms", "failed", "not_measured"})
        for line in lines(tmp_path / "out.jsonl")
    ]
    assert found == [
        ("one", "sail", "ms"),
        ("one", "peer", "not_measured"),
        ("one", "another", "ms"),
        ("two", "sail", "failed"),
        ("three", "sail", "ms"),
        ("three", "peer", "ms"),
    ]


def test_what_finds_no_time_is_named_and_patterns_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [headlines.Headline(f"case {n}", lambda: Steps(), ["peer"], ROW) for n in (1, 2)]
    monkeypatch.setattr(headlines, "headlines", lambda tiny: iter(made))
    monkeypatch.setattr(headlines, "without_card", headlines.nullcontext)
    out = tmp_path / "out.jsonl"
    assert headlines.main(["--tiny", "--budget", "0", "--only", "case 2", "--out", str(out)]) == 0
    assert [(line["case"], line["not_measured"]) for line in lines(out)] == [("case 2", "no time left")] * 2


def test_our_kernels_times_are_said_beside_their_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ours and of its clusters, each from its own line; what was not measured has no line here."""
    up = "sail::cuda::sm90::rows_kernel<__nv_bfloat16, sail::cuda::GatedForwardEpilogue<true> >"
    monkeypatch.setattr(kernels, "launches", lambda steps, name: [kernels.Launch(up, 0.0, 0.875)])
    run = headlines.Run(None, 1.0)
    headline = headlines.Headline("experts T8192 train", lambda: None, [], ROW)
    for name in ("sail", "sail_cluster", "grouped_mm"):
        run.measured(headline, name, None, {"sail": [1.0], name: [2.0]})
    assert [line.get("row", {}).get("launches", {}).keys() for line in run.lines] == [{"sail"}, {"sail_cluster"}, set()]
    said = headlines.kernel_times(run.lines, "NVIDIA H100 80GB HBM3").splitlines()
    assert len(said) == 3 and "moe train T 8192: up" in said[2] and "| 0.875 " in said[2] and "| 0.76 " in said[2]
    assert headlines.kernel_times(run.lines, "NVIDIA H200") == ""


def test_the_verdict_is_by_baseline() -> None:
    rows = [
        {"case": "experts T8192 train", "implementation": "grouped_mm", "speedup": {"grouped_mm": 2.0}},
        {"case": "experts T32768 train", "implementation": "grouped_mm", "speedup": {"grouped_mm": 4.0}},
        {"case": "experts T8192 train", "implementation": "stock_eager", "speedup": {"stock_eager": 100.0}},
        {"case": "experts T8192 forward", "implementation": "grouped_mm", "speedup": {"grouped_mm": 9.0}},
    ]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in headlines.verdict(rows).splitlines()]
    assert ["grouped_mm", "2.00x to 4.00x", "in part"] in cells and ["stock eager", "100.00x", "yes"] in cells
    assert headlines.verdict([]) == "3x: nothing was measured"


def test_stock_eager_has_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAIL_BENCH_SIZE", "full")

    class Clock:
        def step(self, steps: object, name: str) -> float:
            return 0.01

    assert len(headlines.rounds(Clock(), None, ["sail", "stock_eager"])["sail"]) == 1
    assert len(headlines.rounds(Clock(), None, ["sail", "grouped_mm"])["sail"]) == headlines.LEAST_ROUNDS
