"""Runs of `python -m training` for tests: data, a plan of two stages, the environment; what a curve is compared by."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from training.metrics import read_lines

REPOSITORY = Path(__file__).parents[2]
SAME = ("step", "stage", "loss", "grad_norm", "balance_loss", "expert_entropy", "tokens", "lr")
COLORS = ("red", "green", "blue", "black")


def write_data(folder: Path, records: int = 40) -> Path:
    """data.jsonl: questions about one-colored pictures beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for n in range(records):
        color = COLORS[n % len(COLORS)]
        Image.new("RGB", (64, 64), color).save(folder / f"{n}.png")
        questions = [["what color is it?", color], [f"is it {COLORS[n // 2 % 4]}?", "yes" if n % 3 else "no"]]
        lines.append(json.dumps({"picture": f"{n}.png", "questions": questions}))
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_plan(path: Path, data: Path, steps: tuple[int, ...] = (6, 8), **options: Any) -> Path:
    """A YAML file of options: one stage for each of `steps`, the first of which trains the vision encoder alone."""
    chosen = {"recipe": "demo", "data": str(data), "test": "", "stream_length": 160, "streams": 4, "candidates": 8}
    chosen |= {"workers": 1, "save_every": 3, "warmup": 2, "log_every": 1} | options
    stages = [{"name": f"stage {n}", "steps": count} for n, count in enumerate(steps, start=1)]
    if len(stages) > 1:
        stages[0]["train"] = "vision"
    path.write_text(yaml.safe_dump({**chosen, "stages": stages}))
    return path


def command(ranks: int, *arguments: str | Path) -> list[str]:
    """`python -m training`, under torchrun where there are several ranks; its port is one that is free."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "training", *map(str, arguments)]


def environment(**variables: str) -> dict[str, str]:
    """One thread a process; ranks give one another up after seconds."""
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "SAIL_TRAINING_TIMEOUT": "60"}
    return {**os.environ, **own, **variables}


def curve(out: Path) -> list[dict[str, Any]]:
    """The steps of a run, without times."""
    return [{name: line[name] for name in SAME} for line in read_lines(out / "metrics.jsonl")]


def check_close(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """The same batches; losses and norms within assert_close's tolerance for fp32: sums in another order."""
    exact = ("step", "stage", "tokens", "lr")
    assert [{name: line[name] for name in exact} for line in found] == [
        {name: line[name] for name in exact} for line in wanted
    ]
    for name in ("loss", "grad_norm", "balance_loss"):
        one, other = (torch.tensor([line[name] for line in lines]) for lines in (found, wanted))
        torch.testing.assert_close(one, other)
