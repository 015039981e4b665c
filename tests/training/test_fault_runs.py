"""Real processes that are killed, stopped, without room on their disk, more or fewer on resume: nothing is lost."""

import os
import resource
import signal
import socket
import subprocess
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


Process = subprocess.Popen[str]


def started(arguments: list[str], most_bytes: int = resource.RLIM_INFINITY, **variables: str) -> Process:
    """A process whose files may have at most so many bytes."""
    return subprocess.Popen(
        arguments,
        env=environment(**variables),
        cwd=REPOSITORY,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY)),
    )


def ended(process: Process, code: int = 0) -> str:
    """What it printed, once it has ended with `code`."""
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
    return folder / "run", ended(started(command(1, "--config", plan, "--out", folder / "run")))


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
    """From 1 to 2, and from 2 to 1: the same batches, sums in another order."""
    wanted = curve(by_one[0])
    three = by_one[0] / "checkpoints" / checkpoint.step_name(3)
    ended(started(command(2, "--resume", three, "--out", tmp_path / "two", "--save-every", "1")))
    check_close(curve(tmp_path / "two"), wanted[3:])
    five = tmp_path / "two" / "checkpoints" / checkpoint.step_name(5)
    assert checkpoint.read_state(five)["world"] == 2
    ended(started(command(1, "--resume", five, "--out", tmp_path / "one")))
    check_close(curve(tmp_path / "one"), wanted[5:])


def test_a_disk_without_room_is_said_and_the_last_checkpoint_is_an_error(
    by_one: tuple[Path, str], tmp_path: Path
) -> None:
    """A limit on the size of files stands for it: the log fits, a checkpoint does not."""
    three = by_one[0] / "checkpoints" / checkpoint.step_name(3)
    arguments = command(1, "--resume", three, "--out", tmp_path, "--save-every", "1", "--workers", "0")
    text = ended(started(arguments, most_bytes=1_000_000), code=2)
    for step in (4, 5):
        assert f"step {step}: {tmp_path}/checkpoints/step-0000000{step}: could not be written: process 0: " in text
    assert text.count(f"training goes on, the latest is still {three}") == 2
    assert "error: " in text and "step-00000006: could not be written" in text and "Traceback" not in text
    assert curve(tmp_path) == curve(by_one[0])[3:]
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_process_that_does_not_answer_ends_the_others_within_the_time_out(data: Path, tmp_path: Path) -> None:
    """Two processes started by hand, of which nobody takes care; the stopped one finds itself alone when it goes on."""
    plan = write_plan(tmp_path / "plan.yaml", data, (100_000,), workers=0, max_bad=0.1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        alike = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    alike |= {"SAIL_TRAINING_TIMEOUT": "20"}
    arguments = command(1, "--config", plan, "--out", tmp_path / "run")
    first, second = (started(arguments, **alike, RANK=rank, LOCAL_RANK=rank) for rank in "01")
    try:
        wait_for_steps(first, tmp_path / "run" / "metrics.jsonl")
        second.send_signal(signal.SIGSTOP)
        text = ended(first, code=os.EX_TEMPFAIL)
        second.send_signal(signal.SIGCONT)
        assert "error: process 0: another process of this run has ended or does not answer" in text
        assert text.count("error: ") == 1 and "Traceback" not in text
        assert "Traceback" not in ended(second, code=os.EX_TEMPFAIL)
    finally:
        for process in (first, second):
            process.kill()


def wait_for_steps(process: Process, metrics: Path) -> None:
    """Until a run has made two steps."""
    deadline = time.monotonic() + LIMIT
    while not metrics.exists() or len(read_lines(metrics)) < 2:
        assert process.poll() is None and time.monotonic() < deadline, "the run made no step"
        time.sleep(0.05)
