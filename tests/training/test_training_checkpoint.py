"""Checkpoints are whole or not there; what is damaged is said; schedule, metrics and signals of a resumed run."""

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from tiny_trainer import DATA, OneWeight, tiny_trainer

from training import checkpoint, cli, interrupt
from training.errors import InputError
from training.interrupt import Watch
from training.metrics import MetricsLog, activation_entropy, read_lines
from training.recipes import Recipe
from training.schedule import cosine_with_warmup

pytestmark = pytest.mark.usefixtures("alone")


def publish(root: Path, step: int, write: Callable[[Path], None] | None = None, keep: int = 2) -> Path:
    def default(folder: Path) -> None:
        (folder / "weights").write_text(f"weights of step {step}")

    state = {**dict.fromkeys(checkpoint.KEYS), "step": step, "total": step, "plan": [Recipe().as_dict()]}
    return checkpoint.publish(root, step, state, write or default, keep=keep)


def weights(root: Path) -> str:
    newest = checkpoint.latest(root)
    assert newest is not None
    return (newest / "weights").read_text()


# ---- checkpoints
def test_published_checkpoint_is_latest_and_whole(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    written = publish(tmp_path, 5)
    assert checkpoint.latest(tmp_path) == written == tmp_path / "step-00000005"
    assert checkpoint.read_state(written)["step"] == 5 and weights(tmp_path) == "weights of step 5"


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        publish(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000003", "step-00000004"]


def test_the_first_checkpoint_is_found_without_its_pointer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between the two renames: neither is it lost, nor does the folder refuse both --out and --resume."""

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            publish(tmp_path, 1)
    assert not (tmp_path / "latest").exists() and weights(tmp_path) == "weights of step 1"


def test_a_kill_in_the_first_checkpoint_leaves_a_folder_that_can_be_used_anew(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / ".writing-step-00000003").mkdir(parents=True)
    made = cli.parser("training", "", out="runs/none", recipe="sft")
    assert cli.read(made, ["--out", str(tmp_path / "run")]).start is None
    publish(tmp_path / "run" / "checkpoints", 3)
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    with pytest.raises(InputError, match="holds checkpoints; give --resume"):
        cli.read(made, ["--out", str(tmp_path / "run")])


def test_half_removed_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path, 1, keep=1)
    monkeypatch.setattr("shutil.rmtree", lambda path, ignore_errors=False: None)
    publish(tmp_path, 2, keep=1)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000002"]


def test_one_run_at_a_time_writes_in_a_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    wanted = pytest.raises(InputError, match="--out: .*run: another run writes in it")
    with checkpoint.only_run_in(run), wanted, checkpoint.only_run_in(run):
        pass
    with checkpoint.only_run_in(run):
        pass


@pytest.mark.parametrize("moment", ["write", "flush", "rename", "pointer"])
def test_a_crash_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    publish(tmp_path, 1)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    def half(folder: Path) -> None:
        (folder / "weights").write_text("half of")
        if moment == "write":
            crash()

    with monkeypatch.context() as patched:
        if moment == "flush":
            patched.setattr(checkpoint, "flush", crash)
        if moment == "rename":
            patched.setattr(Path, "rename", crash)
        if moment == "pointer":
            patched.setattr(Path, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            publish(tmp_path, 2, half)
    assert weights(tmp_path) == "weights of step 1"
    publish(tmp_path, 2)
    assert weights(tmp_path) == "weights of step 2"
    assert not list(tmp_path.glob(".*"))  # leftovers of the crash are cleared away


def test_a_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    first, second = publish(tmp_path, 3), publish(tmp_path, 3)
    assert first != second and first.is_dir() and checkpoint.latest(tmp_path) == second


def test_replace_folder(tmp_path: Path) -> None:
    for text in ("old", "new"):
        (tmp_path / "writing").mkdir()
        (tmp_path / "writing" / "file").write_text(text)
        checkpoint.replace_folder(tmp_path / "writing", tmp_path / "final")
    assert (tmp_path / "final" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_resolve_finds_run_folder_and_single_checkpoint(tmp_path: Path) -> None:
    written = publish(tmp_path / "checkpoints", 1)
    for path in (tmp_path, tmp_path / "checkpoints", written):
        assert checkpoint.resolve(path) == written
    with pytest.raises(InputError, match="--resume: .*nowhere: no trainer.json"):
        checkpoint.resolve(tmp_path / "nowhere")


def test_a_pointer_to_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("step-00000009\n")
    with pytest.raises(InputError, match="step-00000009, which is no complete checkpoint"):
        checkpoint.latest(tmp_path)


# ---- damaged, or of something else
DAMAGES: dict[str, tuple[str, str | None]] = {
    "no JSON": ("trainer.json", "{"),
    "of another version": ("trainer.json", "{}"),
    "the engine's file cut": ("engine/weight", "1.0"),
    "the engine's file missing": ("engine/weight", None),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_one_sentence(tmp_path: Path, damage: tuple[str, str | None]) -> None:
    with tiny_trainer(tmp_path, OneWeight()) as trainer:
        saved = trainer.fit()
    name, text = damage
    (saved / name).unlink()
    if text is not None:
        (saved / name).write_text(text)
    wanted = f"--resume: {saved}: damaged, or written by another version .*go on from another one of {saved.parent}"
    if text is None:
        assert checkpoint.latest(saved.parent) == saved
    with pytest.raises(InputError, match=wanted) as raised, tiny_trainer(tmp_path, OneWeight(), start=saved):
        pass
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("key", sorted(checkpoint.KEYS))
def test_a_checkpoint_that_lacks_what_this_version_needs_is_one_sentence(tmp_path: Path, key: str) -> None:
    state = dict.fromkeys(checkpoint.KEYS - {key})
    (tmp_path / checkpoint.TRAINER).write_text(json.dumps(state))
    with pytest.raises(InputError, match=f"--resume: .*written by another version .*trainer.json has no {key}"):
        checkpoint.read_state(tmp_path)


def test_what_is_saved_is_what_is_asked_for_and_read_once(tmp_path: Path) -> None:
    with tiny_trainer(tmp_path, OneWeight()) as trainer:
        saved = trainer.fit()
    assert checkpoint.read_state(saved).keys() == checkpoint.KEYS
    with patch.object(checkpoint, "read_state", wraps=checkpoint.read_state) as reads:
        with tiny_trainer(tmp_path, OneWeight(), start=saved, steps=12) as again:
            assert again.step == 9
        assert reads.call_count == 1


def test_a_lost_process_is_no_damage() -> None:
    lost = RuntimeError("[/gloo/transport/tcp/pair.cc:1] Connection closed by peer")
    with pytest.raises(RuntimeError) as raised, checkpoint.reading(Path("step-1")):
        raise lost
    assert raised.value is lost


def test_other_data_is_refused(tmp_path: Path) -> None:
    with tiny_trainer(tmp_path, OneWeight()) as trainer:
        saved = trainer.fit()
    other: list[dict[str, Any]] = [{**DATA[0], "records": 65}]
    wanted = "trained on 64 records, sha256 000000000000, weight 1, but .* has 65 records, sha256 000000000000"
    with pytest.raises(InputError, match=wanted), tiny_trainer(tmp_path, OneWeight(), start=saved, data=other):
        pass


# ---- schedule, metrics, signals
def test_schedule_by_hand() -> None:
    rates = [cosine_with_warmup(step, peak=1.0, warmup=4, steps=12, floor=0.2) for step in range(14)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0 and rates[8] == pytest.approx(0.6) and rates[12:] == [0.2, 0.2]
    assert cosine_with_warmup(0, peak=1.0, warmup=0, steps=1) == 1.0


def test_activation_entropy() -> None:
    assert activation_entropy(torch.tensor([5, 5, 5, 5])) == pytest.approx(1.0)
    assert activation_entropy(torch.tensor([9, 0, 0, 0])) == 0.0
    assert activation_entropy(torch.tensor([5, 5, 0, 0])) == pytest.approx(math.log(2) / math.log(4))


def test_a_resumed_log_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, keep_steps=0)
    for step in (1, 2, 3):
        log.write({"step": step})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # a crash in the middle of a line
    again = MetricsLog(path, keep_steps=2)
    again.write({"step": 3, "again": True})
    again.close()
    assert read_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]
    assert len(path.read_text().splitlines()) == len([json.dumps(line) for line in read_lines(path)])


def test_lines_that_a_full_disk_cuts_are_whole_once_there_is_room(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", keep_steps=0)
    file = log._file
    log._file = Mock()
    log._file.write.side_effect = [file.write(b'{"ste'), OSError(28, "No space left on device")]
    with pytest.raises(OSError, match="No space left"):
        log.write({"step": 1})
    log._file = file
    log.write({"step": 2})
    log.close()
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]


def test_watch_notes_the_first_signal_and_restores_the_handlers() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Watch() as watch:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # the launcher passing it on: no second request
        assert watch.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("launched", [True, False])
def test_the_end_of_torchrun_stops_its_processes(monkeypatch: pytest.MonkeyPatch, launched: bool) -> None:
    """Killed, it ends nobody: they would train on, beside the run that was started in their place."""
    if launched:
        monkeypatch.setenv(interrupt.LAUNCHED, "run")
    monkeypatch.setattr(os, "getppid", lambda: 1)
    with Watch() as watch:
        assert watch.number == (signal.SIGHUP if launched else 0)


@pytest.mark.parametrize("ignored", [True, False])
def test_nohup_stays(ignored: bool) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with Watch() as watch:
            signal.raise_signal(signal.SIGHUP)
            assert watch.number == (0 if ignored else signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_impatient_second_signal_acts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.interrupt.REPEAT_SECONDS", -1.0)
    # the background job of a shell starts with SIGINT ignored: then Python has no handler that could raise
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), Watch():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
