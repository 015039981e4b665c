"""Whole runs through the command line and DeepSpeed: ranks, resume, signals, corrupt pictures, stages, the demo."""

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

from sail_model import SailVL2ForConditionalGeneration, SailVL2Processor
from training import checkpoint, cli
from training.data.easy_vqa import EasyVqa
from training.data.mixture import open_data, usable
from training.evaluate import pairs
from training.metrics import read_lines

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[2]
LIMIT = 240  # seconds: a run takes about 10, but other work may hold the cores
STEPS, HALF = 8, 4
FLAGS = [
    *("--steps", STEPS, "--save-every", HALF, "--warmup", "2", "--lr", "1e-3", "--keep", "3"),
    *("--streams", "4", "--stream-length", "160", "--candidates", "16", "--max-bad", "0.2"),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(ranks: int, module: str, *arguments: object) -> list[str]:
    words = list(map(str, arguments))
    if ranks == 1:
        return [sys.executable, "-m", module, *words]
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}"]
    return [sys.executable, *launcher, "-m", module, *words]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def run(ranks: int, module: str, *arguments: object) -> str:
    done = subprocess.run(
        command(ranks, module, *arguments),
        env=environment(),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture: sixty pictures of easy-vqa, one cut off in the middle, one line broken; and talk without pictures."""
    folder = tmp_path_factory.mktemp("data")
    lines, source = [], EasyVqa("easy_vqa")
    for n in range(60):
        record = source.conversation(n)
        picture = folder / f"{n}.png"
        picture.write_bytes(Path(record.where).read_bytes()[: 100 if n == 7 else None])
        lines.append(json.dumps({"picture": picture.name, "questions": list(map(list, pairs([record])))[:6]}))
    (folder / "pictures.jsonl").write_text("\n".join([*lines, "{"]) + "\n")
    talk = [
        [{"role": "user", "content": f"what is {n}?"}, {"role": "assistant", "content": f"{n} is {n}"}] * 2
        for n in range(30)
    ]
    (folder / "talk.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in talk))
    (folder / "mixture.yaml").write_text("sources:\n- path: pictures.jsonl\n- {path: talk.jsonl, weight: 0.5}\n")
    return folder / "mixture.yaml"


@pytest.fixture(scope="module")
def by_one(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of one process: its folder and what it printed."""
    out = tmp_path_factory.mktemp("by_one")
    return out, run(1, "training", "--data", data, *FLAGS, "--out", out)


@pytest.fixture(scope="module")
def by_two(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by two processes, each with a process that reads ahead."""
    out = tmp_path_factory.mktemp("by_two")
    run(2, "training", "--data", data, *FLAGS, "--workers", "1", "--out", out)
    return out


def curve(out: Path, name: str) -> list[Any]:
    return [line[name] for line in read_lines(out / "metrics.jsonl")]


def test_two_processes_give_the_run_of_one(by_one: tuple[Path, str], by_two: Path) -> None:
    one, two = by_one[0], by_two
    assert curve(one, "step") == curve(two, "step") == list(range(1, STEPS + 1))
    for name in ("tokens", "labels", "tiles", "skipped_records", "lr"):
        assert curve(one, name) == curve(two, name), name
    for name in ("loss", "balance_loss", "grad_norm"):
        # assert_close's tolerance for fp32: the sums are the same, in another order
        torch.testing.assert_close(torch.tensor(curve(two, name)), torch.tensor(curve(one, name)))
    assert curve(one, "loss")[-1] < curve(one, "loss")[0]
    weights = [SailVL2ForConditionalGeneration.from_pretrained(out / "model").state_dict() for out in (one, two)]
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_repeats_the_loss_curve_exactly(
    ranks: int, by_one: tuple[Path, str], by_two: Path, tmp_path: Path
) -> None:
    whole = by_one[0] if ranks == 1 else by_two
    run(ranks, "training", "--resume", whole / "checkpoints" / checkpoint.step_name(HALF), "--out", tmp_path)
    for name in ("step", "loss", "grad_norm", "balance_loss", "expert_entropy", "tokens", "skipped_records"):
        assert curve(tmp_path, name) == curve(whole, name)[HALF:], name


def test_bad_records_are_skipped_and_reported(by_one: tuple[Path, str]) -> None:
    out, printed = by_one
    assert curve(out, "skipped_records")[-1] > 0
    assert "pictures.jsonl: line 61: Expecting property name" in printed
    assert "pictures.jsonl: line 8: " in printed and "truncated" in printed


def test_each_layer_is_logged(by_one: tuple[Path, str]) -> None:
    for line in read_lines(by_one[0] / "metrics.jsonl"):
        assert len(line["expert_entropy"]) == len(line["balance_loss"]) == 3
        assert all(0 < value <= 1 for value in line["expert_entropy"])
        assert line["tokens_per_s"] > 0 and line["mfu"] > 0 and 0 <= line["data_wait"] < 1 and line["padding"] < 0.5


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_writes_a_checkpoint_first(ranks: int, data: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(ranks, "training", "--data", data, *FLAGS, "--steps", 100000, "--out", tmp_path),
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
    assert state["total"] == int(found[1]) == curve(tmp_path, "step")[-1]
    assert len(list((saved / "engine").glob("rank-*.safetensors"))) == ranks
    if ranks == 1:
        assert process.returncode == 128 + signal.SIGTERM


def wait_for_steps(process: "subprocess.Popen[str]", metrics: Path, steps: int) -> None:
    deadline = time.monotonic() + LIMIT
    while not metrics.exists() or len(metrics.read_text().splitlines()) < steps:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run made no step"
        time.sleep(0.05)


STAGES = """
data: {data}
test: {test}
warmup: 2
streams: 2
max_bad: 0.2
save_every: 2
keep: 9
stages:
- {{name: adapter, train: adapter, steps: 3}}
- {{name: steady, steps: 3, micro_batches: 2, vision_lr: 0.5, dtype: bfloat16}}
- {{name: factors, steps: 2, lora_rank: 2, zero_stage: 1, gradient_checkpointing: true}}
"""


def test_the_demo_trains_by_stages_tests_draws_and_answers(data: Path, tmp_path: Path) -> None:
    held_out = data.parent / "pictures.jsonl"
    config = tmp_path / "stages.yaml"
    config.write_text(STAGES.format(data=held_out, test=held_out))
    out = tmp_path / "run"
    printed = run(1, "training.demo", "--config", config, "--out", out)
    for words in (
        "the trained model",
        "pictures blanked",
        "most frequent answer",
        "right answer:",
        "steady",
    ):
        assert words in printed
    assert curve(out, "stage") == ["adapter"] * 3 + ["steady"] * 3 + ["factors"] * 2
    text = (out / "results.json").read_text()
    found = json.loads(text)
    rows = found["exact_match"]
    asked = rows["the trained model"]["asked"]
    assert sum(row["asked"] for name, row in rows.items() if name.startswith("of these")) == asked > 0
    assert rows["most frequent answer"]["asked"] == sum(1 for _ in pairs(usable(open_data(str(held_out)))))
    assert [recipe["steps"] for recipe in found["recipe"]] == [3, 3, 2] and found["processes"] == 1
    model = SailVL2ForConditionalGeneration.from_pretrained(out / "model")
    assert found["device"].startswith("cpu-") and found["versions"]["torch"] == torch.__version__
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert not any(str(place) in text for place in (data.parent, tmp_path, REPOSITORY))
    assert socket.gethostname() not in text and len(text) < 8000
    with Image.open(out / "curves.png") as picture:
        assert min(picture.size) > 200
    SailVL2Processor.from_pretrained(out / "model")
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    # from the middle of a stage on, and from its end
    for step in ("step-00000005", "step-00000006"):
        again = tmp_path / step
        run(1, "training", "--resume", out / "checkpoints" / step, "--out", again)
        assert curve(again, "loss") == curve(out, "loss")[int(step[-1]) :], step


def line(picture: str = "a.png", question: str = "what?") -> str:
    return json.dumps({"picture": picture, "questions": [[question, "this"]]}) + "\n"


LONG = line(question="what? " * 2000)


@pytest.mark.parametrize(
    ("module", "lines", "more", "error"),
    [
        ("training", None, [], "--resume: "),
        (
            "training",
            '{"picture": "b.png"}\n',
            [],
            "process 0: data: no record can be used; .* line 1: got picture; want",
        ),
        ("training", line(), ["--streams", "3", "--micro-batches", "2"], "Recipe: streams: got 3"),
        ("training", line(), ["--device", "cuda"], "--device: cuda cannot be used here: "),
        ("training.demo", line(), [], "training.demo: --test: got none"),
        ("training.demo", line() + LONG, ["--test", "DATA"], "--test: .*line 1: .*No such file"),
    ],
    ids=["resume", "no questions", "streams", "device", "nothing held out", "held out"],
)
def test_errors_of_the_user_are_one_line(
    module: str,
    lines: str | None,
    more: list[str],
    error: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--resume", str(tmp_path)]
    if lines is not None:
        (tmp_path / "data.jsonl").write_text(lines)
        arguments = ["--recipe", "sft", "--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "run")]
        arguments += [word.replace("DATA", str(tmp_path / "data.jsonl")) for word in more]
    main = import_module("training.__main__" if module == "training" else module).main
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with patch.dict(os.environ), pytest.raises(SystemExit) as stop:  # a run sets what torchrun would
        cli.run(main)
    assert stop.value.code == 2
    assert re.fullmatch(rf"error: (.*/)?{error}.*", capsys.readouterr().err.strip().splitlines()[-1])
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not read_lines(tmp_path / "run" / "metrics.jsonl")


def test_an_error_of_the_user_ends_the_command(tmp_path: Path) -> None:
    arguments = command(1, "training", "--resume", tmp_path)
    done = subprocess.run(arguments, env=environment(), cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
