"""What a run reports: entropy, peaks, lines that a resumed run takes up, TensorBoard, the table and the picture."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny_model import tiny_config

from sail_model import SailVL2ForConditionalGeneration
from training import parallel
from training.metrics import FlopCount, peak_flops, peak_memory, read_lines
from training.plots import curve, plot_curves, smoothed, stage_starts
from training.progress import closing_table, figures
from training.runlog import METRICS, RunLog
from training.tensorboard import TensorBoard

pytestmark = pytest.mark.usefixtures("alone")


def line(step: int, stage: str = "all", layers: int = 2, **changes: Any) -> dict[str, Any]:
    found = {"step": step, "stage": stage, "loss": 1 / step, "tokens": 100, "seconds": 0.5, "data_wait": 0.01}
    found |= {"padding": 0.02, "skipped_records": 3, "skipped_steps": 1, "lr": 1e-3}
    found |= {"balance_loss": [2.0] * layers, "expert_entropy": [0.9] * layers}
    return {**found, **changes}


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H200", 989e12), ("NVIDIA H20", 148e12), ("NVIDIA H100 80GB HBM3", 989e12), ("A100-SXM4-80GB", 312e12)],
)
def test_peaks_of_cards(name: str, peak: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops("bfloat16") == peak


def test_of_a_cpu_rate_and_memory_are_measured() -> None:
    assert peak_flops("float32") > 1e8 and peak_memory() > 50e6


@pytest.mark.parametrize(
    ("trained", "times"),
    [
        (("vision_model", "mlp1", "language_model"), (3, 3, 3)),
        # below the lowest trained part nothing is differentiated, above it a frozen one passes the gradient through
        (("mlp1",), (1, 3, 2)),
        (("language_model",), (1, 1, 3)),
        (("vision_model",), (3, 2, 2)),
        (("vision_model", "mlp1"), (3, 3, 2)),
        ((), (1, 1, 1)),
    ],
)
def test_frozen_parts_cost_less(trained: tuple[str, ...], times: tuple[int, int, int]) -> None:
    model = SailVL2ForConditionalGeneration(tiny_config(moe=True))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained) if trained else False)
    count = FlopCount(model, model.config)
    assert tuple(count.times[part] for part in ("vision_model", "mlp1", "language_model")) == times
    # pictures cost by their two parts' times, text by its own
    forward = [count.step(tokens=n, labels=n, pairs=n, tiles=t) for n, t in ((100, 0), (100, 2))]
    whole = FlopCount(model.requires_grad_(True), model.config)
    assert forward[0] * 3 == pytest.approx(times[2] * whole.step(tokens=100, labels=100, pairs=100, tiles=0))
    assert forward[1] - forward[0] == pytest.approx(count.step(tokens=0, labels=0, pairs=0, tiles=2))


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, round(event.value, 6)) for event in events.Scalars(tag)]


def test_tensorboard_has_the_curves_and_a_resumed_run_draws_them_once(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, keep_steps=0)
    for step in (1, 2, 3):
        board.write(line(step))
    board.close()
    again = TensorBoard(tmp_path, keep_steps=2)
    again.write(line(3, loss=7.0))
    again.close()
    assert scalars(tmp_path, "training/loss") == [(1, 1.0), (2, 0.5), (3, 7.0)]
    assert scalars(tmp_path, "balance_loss/layer 1")[0] == (1, 2.0)


def test_the_log_of_a_run_and_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, steps=3, done=0, log_every=2, peak_flops=1e6) as log:
        for step, stage in ((1, "one"), (2, "one"), (3, "two")):
            log.write(line(step, stage), flops=2e5)
        log.say("a word")
        log.end()
    lines = read_lines(tmp_path / METRICS)
    assert [found["tokens_per_s"] for found in lines] == [200.0] * 3 and lines[0]["mfu"] == pytest.approx(0.4)
    shown = capsys.readouterr().out
    assert "step 2/3  one  loss 0.5000  200 tokens/s  MFU 40.0%" in shown and "a word" in shown
    assert "step 1/3" not in shown and "step 3/3" in shown
    assert "3 records, 1 steps" in shown and "peak memory" in shown
    assert figures(lines[0]).endswith("data 1.0%")


def test_a_table_of_nothing(tmp_path: Path) -> None:
    (tmp_path / METRICS).touch()
    Console(quiet=True).print(closing_table(tmp_path / METRICS, 0.0))


def test_a_table_has_a_column_for_each_stage_and_leaves_skipped_steps_out(tmp_path: Path) -> None:
    losses = {"one": [4.0, math.nan, 2.0], "two": [math.nan]}
    lines = [line(1, name, loss=loss, mfu=0.25) for name, found in losses.items() for loss in found]
    (tmp_path / METRICS).write_text("".join(json.dumps(found) + "\n" for found in lines))
    table = closing_table(tmp_path / METRICS, 9.0)
    one, two = (dict(zip(table.columns[0].cells, column.cells, strict=True)) for column in table.columns[1:])
    assert one["steps"] == "3" and one["tokens/s"] == "200" and one["MFU"] == "25.0%" and one["padding"] == "2.0%"
    assert one["loss"] == "4.0000 -> 2.0000" and two["loss"] == "none -> none"


def test_a_curve_has_the_steps_that_have_its_value() -> None:
    """A stage of another model may have fewer expert layers; a step whose loss is not finite is skipped."""
    lines = [line(1, layers=0), line(2, layers=1, loss=math.nan), line(3, layers=2), line(4, layers=1, loss=math.inf)]
    assert curve(lines, "loss") == ([1, 3], [1.0, pytest.approx(1 / 3)])
    assert curve(lines, "balance_loss", 0) == ([2, 3, 4], [2.0] * 3) and curve(lines, "balance_loss", 1) == ([3], [2.0])
    assert curve([], "loss") == ([], []) and smoothed([]) == []
    assert smoothed([3.0] * 4) == pytest.approx([3.0] * 4)


@pytest.mark.parametrize("layers", [(0, 0), (2, 2), (1, 3), (3, 1), (0, 2)])
def test_a_picture_of_stages(layers: tuple[int, int], tmp_path: Path) -> None:
    lines = [line(step, "one" if step < 3 else "two", layers[step >= 3]) for step in range(1, 6)]
    assert stage_starts(lines) == [(1, "one"), (3, "two")] and stage_starts(lines[:2]) == []
    (tmp_path / METRICS).write_text("".join(json.dumps(found) + "\n" for found in lines))
    plot_curves(tmp_path / METRICS, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert min(picture.size) > 200
