"""Whole runs through the command line and DeepSpeed: ranks, resume, signals, corrupt pictures, the demo."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from training.records import easy_vqa

from sail_model import SailVL2ForConditionalGeneration
from training import checkpoint, cli
from training.metrics import read_lines

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[2]
LIMIT = 240  # seconds: a run takes about 10, but other work may hold the cores
STEPS, HALF = 8, 4
FLAGS = ["--steps", str(STEPS), "--save-every", str(HALF), "--warmup", "2", "--stream-length", "160"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(ranks: int, module: str, *arguments: str) -> list[str]:
    if ranks == 1:
        return [sys.executable, "-m", module, *arguments]
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}"]
    return [sys.executable, *launcher, "-m", module, *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)}


def run(ranks: int, module: str, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return finish(command(ranks, module, *map(str, arguments)))


def finish(arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        arguments,
        env=environment(),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty pictures of easy-vqa, one of them cut off in the middle."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for n, record in enumerate(easy_vqa("train")[:60]):
        picture = folder / f"{n}.png"
        picture.write_bytes(record.picture.read_bytes()[: 100 if n == 7 else None])
        lines.append(json.dumps({"picture": picture.name, "questions": record.questions[:6]}))
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def by_one(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of one process, four streams a step: its folder and what it printed."""
    out = tmp_path_factory.mktemp("by_one")
    done = run(1, "training", "--data", data, *FLAGS, "--streams", "4", "--out", out)
    return out, done.stdout + done.stderr


@pytest.fixture(scope="module")
def by_two(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by two processes, two streams a step each."""
    out = tmp_path_factory.mktemp("by_two")
    run(2, "training", "--data", data, *FLAGS, "--streams", "2", "--out", out)
    return out


def curve(out: Path, name: str) -> list[Any]:
    return [line[name] for line in read_lines(out / "metrics.jsonl")]


def test_two_processes_give_the_loss_of_one(by_one: tuple[Path, str], by_two: Path) -> None:
    one, two = by_one[0], by_two
    assert curve(one, "step") == curve(two, "step") == list(range(1, STEPS + 1))
    for name in ("tokens", "skipped_pictures", "expert_entropy"):
        assert curve(one, name)[0] == curve(two, name)[0]
    for name in ("loss", "balance_loss", "grad_norm"):
        # assert_close's tolerance for fp32: the sums are the same, in another order
        torch.testing.assert_close(torch.tensor(curve(two, name)), torch.tensor(curve(one, name)))
    assert curve(one, "loss")[-1] < curve(one, "loss")[0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_repeats_the_loss_curve_exactly(
    ranks: int, by_one: tuple[Path, str], by_two: Path, tmp_path: Path
) -> None:
    whole = by_one[0] if ranks == 1 else by_two
    run(ranks, "training", "--resume", whole / "checkpoints" / checkpoint.step_name(HALF), "--out", tmp_path)
    for name in ("step", "loss", "grad_norm", "balance_loss", "expert_entropy"):
        assert curve(tmp_path, name) == curve(whole, name)[HALF:], name


def test_a_corrupt_picture_is_skipped_and_reported(by_one: tuple[Path, str]) -> None:
    out, printed = by_one
    assert sum(curve(out, "skipped_pictures")) > 0
    assert "skipped 1 corrupt picture" in printed and "7.png" in printed


def test_each_layer_is_logged(by_one: tuple[Path, str]) -> None:
    for line in read_lines(by_one[0] / "metrics.jsonl"):
        assert len(line["expert_entropy"]) == len(line["balance_loss"]) == 3
        assert all(0 < value <= 1 for value in line["expert_entropy"])
        assert line["tokens_per_s"] > 0 and line["mfu_like"] > 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_writes_a_checkpoint_first(ranks: int, data: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(data), "--steps", "100000", "--streams", "1", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command(ranks, "training", *arguments),
        env=environment(),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for_steps(process, tmp_path / "metrics.jsonl", 3)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    assert process.returncode != 0
    found = re.search(r"stopped by SIGTERM after step (\d+); go on with: --resume (\S+)", printed)
    assert found, printed
    saved = checkpoint.latest(tmp_path / "checkpoints")
    assert saved is not None and str(saved) == found[2]
    state = checkpoint.read_state(saved)
    assert state["step"] == int(found[1]) == curve(tmp_path, "step")[-1]
    assert {path.name for path in saved.iterdir()} >= {f"rng-{rank}.pt" for rank in range(ranks)}
    if ranks == 1:
        assert process.returncode == 128 + signal.SIGTERM


def wait_for_steps(process: "subprocess.Popen[str]", metrics: Path, steps: int) -> None:
    deadline = time.monotonic() + LIMIT
    while not metrics.exists() or len(metrics.read_text().splitlines()) < steps:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run made no step"
        time.sleep(0.05)


def test_zero_2_over_two_ranks_is_one_process_where_a_rank_reaches_no_expert_or_router(tmp_path: Path) -> None:
    """A rank's tokens go to experts that the other's never reach, and in every other step it learns nothing at all."""
    worker = str(Path(__file__).parents[1] / "support" / "dead_experts.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    finish([*launcher, worker, str(tmp_path / "two.pt"), "2"])
    finish([sys.executable, worker, str(tmp_path / "one.pt"), "0"])
    two, one = (torch.load(tmp_path / f"{name}.pt") for name in ("two", "one"))
    assert all(
        counts == [4, 4] for found in (one, two) for counts in found["dead"]
    )  # experts without a token, by layer
    torch.testing.assert_close(torch.tensor(two["losses"]), torch.tensor(one["losses"]))
    torch.testing.assert_close(two["weights"], one["weights"])
    assert one["losses"][2] < one["losses"][0]


def test_the_demo_trains_tests_draws_and_answers(data: Path, tmp_path: Path) -> None:
    done = run(1, "training.demo", "--data", data, "--steps", "2", "--out", tmp_path)
    for words in ("the trained model", "pictures blanked", "most frequent answer", "right answer:", "all"):
        assert words in done.stdout
    text = (tmp_path / "results.json").read_text()
    found = json.loads(text)
    rows = found["exact_match"]
    asked = rows["the trained model"]["asked"]
    assert (
        asked == rows["most frequent answer"]["asked"] == rows["the same model, pictures blanked at test"]["asked"] > 0
    )
    assert sum(row["asked"] for name, row in rows.items() if name.startswith("of these")) == asked
    assert found["recipe"]["steps"] == 2 and found["first_step"] == 0 and found["processes"] == 1
    model = SailVL2ForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["device"].startswith("cpu-") and found["versions"]["torch"] == torch.__version__
    assert found["recipe"]["data"] == data.name  # and no folder of this machine anywhere
    assert (
        not any(str(place) in text for place in (data.parent, tmp_path, REPOSITORY))
        and socket.gethostname() not in text
    )
    assert len(text) < 4000
    with Image.open(tmp_path / "curves.png") as picture:
        assert min(picture.size) > 200
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "model").iterdir()
    }


def line(picture: str = "a.png", question: str = "what?") -> str:
    return json.dumps({"picture": picture, "questions": [[question, "this"]]}) + "\n"


LONG = line(question="what? " * 2000)


@pytest.mark.parametrize(
    ("module", "lines", "error"),
    [
        ("training", None, "--resume: "),
        ("training", line() + '{"picture": "b.png", "questions": []}\n', "data.jsonl: line 2: "),
        ("training", LONG, "a.png: split_to_fit: sample: .* want a larger --stream-length"),
        ("training.demo", line(), "data.jsonl: got 1 record, want at least 2"),
        ("training.demo", line() + LONG, "a.png: split_to_fit: sample: .* want a larger --stream-length"),
    ],
    ids=["resume", "no question", "long question", "nothing held out", "long question held out"],
)
def test_errors_of_the_user_are_one_line_and_come_before_training(
    module: str,
    lines: str | None,
    error: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--resume", str(tmp_path)]
    if lines is not None:
        (tmp_path / "data.jsonl").write_text(lines)
        arguments = ["--data", str(tmp_path / "data.jsonl"), "--steps", "1", "--out", str(tmp_path / "run")]
    main = import_module("training.__main__" if module == "training" else module).main
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with patch.dict(os.environ), pytest.raises(SystemExit) as stop:  # a run sets what torchrun would
        cli.run(main)
    assert stop.value.code == 2
    assert re.fullmatch(rf"error: (.*/)?{error}.*", capsys.readouterr().err.strip())
    assert not (tmp_path / "run").exists()


def test_an_error_of_the_user_ends_the_command(tmp_path: Path) -> None:
    arguments = command(1, "training", "--resume", str(tmp_path))
    done = subprocess.run(arguments, env=environment(), cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
