"""Real processes that are killed, stopped, without room on their disk, more or fewer on resume: nothing is lost."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kill_runs import Moment, run
from tiny_runs import REPOSITORY, check_close, command, curve, environment, write_data, write_plan

from training import checkpoint
from training.metrics import read_lines

pytestmark = pytest.mark.slow
LIMIT = 240  # seconds: a run takes about 10, but other work may hold the cores


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One stage of six steps over records of which some are of no use."""
    folder = tmp_path_factory.mktemp("data")
    path = write_data(folder, records=120)
    (folder / "7.png").write_bytes((folder / "7.png").read_bytes()[:40])
    lines = path.read_text().splitlines()
    lines[3] = lines[3][:20]
    path.write_text("\n".join(lines) + "\n")
    return path


def started(arguments: list[str], **variables: str) -> "subprocess.Popen[str]":
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(arguments, env=environment(**variables), cwd=REPOSITORY, text=True, **pipes)  # type: ignore[call-overload,no-any-return]


def printed(arguments: list[str], code: int = 0, **variables: str) -> str:
    process = started(arguments, **variables)
    try:
        text, _ = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    assert process.returncode == code, text
    return text


@pytest.fixture(scope="module")
def by_one(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of one process: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("one")
    plan = write_plan(folder / "plan.yaml", data, (6,), max_bad=0.1)
    return folder / "run", printed(command(1, "--config", plan, "--out", folder / "run"))


def test_three_kills_one_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    chosen = [
        Moment("loader worker", "step", 1, 0.0),
        Moment("rank 1", "save", 0, 0.0),
        Moment("torchrun", "step", 1, 0.0),
    ]
    found = run(tmp_path, chosen, seed=0)
    assert [kill["killed"] for kill in found["moments"]] == [True] * 3
    assert all(kill["messages"] for kill in found["moments"]) and found["runs_equal_to_the_reference"] == 1


def test_bad_records_are_reported_with_file_and_line(by_one: tuple[Path, str], data: Path) -> None:
    out, text = by_one
    assert f"skipped {data}: line 4: " in text and f"skipped {data}: line 8: " in text
    assert read_lines(out / "metrics.jsonl")[-1]["skipped_records"] >= 2


def test_other_numbers_of_ranks_go_on(by_one: tuple[Path, str], tmp_path: Path) -> None:
    """1 -> 2 -> 1 ranks: the same batches, sums in another order."""
    wanted = curve(by_one[0])
    three = by_one[0] / "checkpoints" / checkpoint.step_name(3)
    printed(command(2, "--resume", three, "--out", tmp_path / "two"))
    check_close(curve(tmp_path / "two"), wanted[3:])
    state = checkpoint.read_state(tmp_path / "two" / "checkpoints" / checkpoint.step_name(6))
    assert state["world"] == 2
