"""What a run lives with and what ends it, in the real trainer: full disks, steps not finite, records of no use."""

import errno
import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from memory_samples import MemorySamples
from safetensors import SafetensorError
from tiny_trainer import OneWeight, tiny_trainer

from training import checkpoint, cli, parallel
from training.errors import InputError
from training.faults import BadRecords, NotFinite
from training.interrupt import Interrupted
from training.metrics import MetricsLog, read_lines
from training.recipes import Recipe
from training.tensorboard import TensorBoard

pytestmark = pytest.mark.usefixtures("alone")

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def curve(out: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_lines(out / "metrics.jsonl")]


def whole(out: Path, **options: Any) -> list[tuple[int, float]]:
    """The curve of a run without faults."""
    with tiny_trainer(out, OneWeight(), **options) as trainer:
        trainer.fit()
    return curve(out)


# ---- a full disk
class Disk:
    """`engine.save` on a disk that is full in the `full` saves, from 1 on."""

    def __init__(self, engine: OneWeight, full: tuple[int, ...], error: Exception = FULL) -> None:
        self.saves, self.full, self.error, self._save = 0, full, error, engine.save
        engine.save = self.save  # type: ignore[method-assign]

    def save(self, folder: Path) -> None:
        self.saves += 1
        self._save(folder)  # half of it fits
        if self.saves in self.full:
            raise self.error


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),  # what tokenizers raises
    ],
    ids=["Python", "safetensors", "tokenizers"],
)
def test_a_full_disk_keeps_the_checkpoint_before_and_training_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    with tiny_trainer(tmp_path / "run", engine := OneWeight()) as trainer:
        Disk(engine, (2,), error)
        saved = trainer.fit()
    printed = capsys.readouterr().out
    assert "step 6: " in printed and "No space left on device" in printed
    assert "training goes on, the latest is still " in printed and "step-00000003" in printed
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == [
        "latest",
        "step-00000003",
        "step-00000009",
    ]
    assert saved.name == "step-00000009" and curve(tmp_path / "run") == whole(tmp_path / "whole")


def test_a_full_disk_of_another_rank_is_one_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gather = parallel.gather_objects
    asked = []

    def with_another(value: Any) -> list[Any]:
        asked.append(value)
        return [*gather(value), "process 1: [Errno 28] No space left on device" if len(asked) == 4 else ""]

    def states(value: Any) -> list[Any]:
        return gather(value) if isinstance(value, dict) else with_another(value)

    monkeypatch.setattr(parallel, "gather_objects", states)
    with tiny_trainer(tmp_path, OneWeight()) as trainer:
        trainer.fit()
    # three questions a checkpoint: whether all could make the folder, write, and complete; the fourth is the second's
    assert "step 6: " in (printed := capsys.readouterr().out) and "process 1: [Errno 28]" in printed
    assert not (tmp_path / "checkpoints" / "step-00000006").exists()
    assert not list((tmp_path / "checkpoints").glob(".writing-*"))


def test_a_full_disk_at_the_last_step_is_an_error(tmp_path: Path) -> None:
    with tiny_trainer(tmp_path, engine := OneWeight()) as trainer:
        Disk(engine, (3,))
        with pytest.raises(InputError, match=r"step-00000009: could not be written: process 0: \[Errno 28\]"):
            trainer.fit()
    newest = checkpoint.latest(tmp_path / "checkpoints")
    assert newest is not None and newest.name == "step-00000006"
    with tiny_trainer(tmp_path, OneWeight(), start=newest) as trainer:
        trainer.fit()
    assert curve(tmp_path) == whole(tmp_path / "whole")


def test_a_full_disk_on_a_signal_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.interrupt.Watch.number", 15)
    with tiny_trainer(tmp_path, engine := OneWeight()) as trainer:
        Disk(engine, (1,))
        with pytest.raises(checkpoint.NotSaved, match="No space left"):
            trainer.fit()
    with tiny_trainer(tmp_path, OneWeight()) as trainer, pytest.raises(Interrupted, match="stopped by SIGTERM after"):
        trainer.fit()


def test_an_error_that_is_not_the_disks_is_raised(tmp_path: Path) -> None:
    with tiny_trainer(tmp_path, engine := OneWeight()) as trainer:
        Disk(engine, (1,), TypeError("a mistake"))
        with pytest.raises(TypeError, match="a mistake"):
            trainer.fit()


def test_a_full_disk_delays_lines_of_metrics_and_ends_tensorboard_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flush, asked = MetricsLog._flush, []

    def sometimes(log: MetricsLog) -> None:
        asked.append(log)
        if len(asked) in (3, 4):
            raise FULL
        flush(log)

    def never(board: TensorBoard, line: dict[str, Any]) -> None:
        raise FULL

    monkeypatch.setattr(MetricsLog, "_flush", sometimes)
    monkeypatch.setattr(TensorBoard, "write", never)
    found = whole(tmp_path / "run")
    monkeypatch.undo()
    assert found == whole(tmp_path / "whole")
    printed = capsys.readouterr().out
    assert printed.count("its lines wait for room, training goes on") == 2
    assert printed.count("training goes on without it") == 1


def test_a_full_disk_puts_off_a_trial_of_a_learning_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"adalrs": True, "adalrs_window": 3, "warmup": 0, "schedule": "constant", "steps": 8, "save_every": 100}
    with tiny_trainer(tmp_path, engine := OneWeight(), **options) as trainer:
        Disk(engine, (1,))
        saved = trainer.fit()
    printed = capsys.readouterr().out
    assert "step 3: AdaLRS: " in printed and "No space left on device" in printed
    assert printed.count("is put off") == 1 and "step 6: AdaLRS: peak learning rate" in printed
    rates = [line["lr"] for line in read_lines(tmp_path / "metrics.jsonl")]
    assert rates == [Recipe().lr] * 6 + [3 * Recipe().lr] * 2
    assert (saved / "adalrs" / "weight").read_text().endswith(" 6")  # calls
    assert not list((tmp_path / "checkpoints").glob(".*"))


# ---- a loss or gradient that is not finite
def test_not_finite_steps_are_counted_and_end_the_run_after_some_in_a_row(tmp_path: Path) -> None:
    with (
        tiny_trainer(tmp_path, engine := OneWeight({2, 5, 6, 7}), max_not_finite=3) as trainer,
        pytest.raises(InputError, match="3 steps in a row had a loss or gradient.*go on with: --resume .*-00000007"),
    ):
        trainer.fit()
    assert [line["skipped_steps"] for line in read_lines(tmp_path / "metrics.jsonl")] == [0, 1, 1, 1, 2, 3, 4]
    newest = checkpoint.latest(tmp_path / "checkpoints")
    assert newest is not None and newest.name == "step-00000007"
    losses = [loss for _, loss in curve(tmp_path)]
    assert engine.weight == losses[3], "the checkpoint holds the weights from before"
    with tiny_trainer(tmp_path, again := OneWeight(), start=newest, max_not_finite=3) as trainer:
        assert again.weight == losses[3] and (trainer.not_finite.total, trainer.not_finite.in_a_row) == (4, 3)
        trainer.fit()
    assert [step for step, _ in curve(tmp_path)] == list(range(1, 10))
    assert read_lines(tmp_path / "metrics.jsonl")[-1]["skipped_steps"] == 4


def test_not_finite_counts_in_a_row() -> None:
    count = NotFinite(2)
    for finite in (False, True, False):
        count.add(finite)
    assert not count.too_many and (count.total, count.in_a_row) == (2, 1)
    again = NotFinite(2)
    again.load_state_dict(count.state_dict())
    again.add(False)
    assert again.too_many and again.total == 3


# ---- records that cannot be used
BAD = MemorySamples(bad=((0, 3), (1, 2)), corrupt=((0, 4),))


def test_bad_records_are_skipped_counted_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tiny_trainer(tmp_path, OneWeight(), samples=BAD, max_bad=0.5) as trainer:
        trainer.fit()
    printed = capsys.readouterr().out
    for message in ("0: line 3: is bad", "1: line 2: is bad", "0: line 4: CorruptImageError: no picture"):
        assert f"skipped {message}" in printed
    counted = [line["skipped_records"] for line in read_lines(tmp_path / "metrics.jsonl")]
    assert counted == sorted(counted) and counted[-1] == trainer.bad.bad == printed.count("skipped ")
    assert trainer.bad.read > 64


def test_more_bad_records_than_allowed_end_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    with (
        tiny_trainer(tmp_path, OneWeight(), samples=BAD, max_bad=0.01, steps=100) as trainer,
        pytest.raises(InputError, match=r"data: 2 of \d+ records .*more than --max-bad 0.01.*go on with: --resume"),
    ):
        trainer.fit()
    stopped = trainer.step
    newest = checkpoint.latest(tmp_path / "checkpoints")
    assert newest is not None and newest.name == checkpoint.step_name(stopped)
    with tiny_trainer(tmp_path, OneWeight(), samples=BAD, start=newest, max_bad=0.5, steps=stopped + 3) as trainer:
        assert trainer.bad.bad == 2
        trainer.fit()
    with tiny_trainer(tmp_path / "whole", OneWeight(), samples=BAD, max_bad=0.5, steps=stopped + 3) as trainer:
        trainer.fit()
    assert curve(tmp_path) == curve(tmp_path / "whole")


def test_the_limit_counts_from_a_hundred_records_on() -> None:
    early = BadRecords(0.01)
    assert early.add(1, [("a: line 1", "no object")]) == ["skipped a: line 1: no object"]
    early.check()  # 1 of 1, as 1 of 100
    early.add(98, [("a: line 9", "no object")])
    with pytest.raises(InputError, match="data: 2 of 99 records could not be used.*the last: a: line 9: no object"):
        early.check()
    none = BadRecords(0.0)
    none.check()
    none.add(1, [("a", "b")])
    with pytest.raises(InputError, match="1 of 1 records"):
        none.check()


def test_messages_about_bad_records_end_but_not_their_count() -> None:
    bad = BadRecords(1.0)
    shown = [message for n in range(30) for message in bad.add(1, [(f"line {n}", "no object")])]
    assert len(shown) == 21 and shown[-1] == "skipped more records; metrics.jsonl goes on counting them"
    assert bad.bad == 30


def test_data_that_ends_ends_the_run_with_a_checkpoint_of_the_last_step(tmp_path: Path) -> None:
    """The rows that other ranks or streams had drawn already are drawn again: the curve is the uninterrupted one."""
    with tiny_trainer(tmp_path, OneWeight()) as trainer:
        read = trainer.loader.next

        def broken() -> Any:
            if trainer.step == 4:
                read()
                raise InputError("data: no record can be used")
            return read()

        trainer.loader.next = broken  # type: ignore[method-assign]
        with pytest.raises(
            InputError, match="process 0: data: no record can be used; go on with: --resume .*-00000004"
        ):
            trainer.fit()
    with tiny_trainer(tmp_path, OneWeight(), start=trainer.saved) as trainer:
        trainer.fit()
    assert curve(tmp_path) == whole(tmp_path / "whole")


def test_a_killed_loader_worker_ends_the_run_with_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)  # seconds; torch's own is 5
    deadly = MemorySamples(killer=(0, 7))
    wanted = "process 0: data: a worker process died.*go on with: --resume"
    with (
        tiny_trainer(tmp_path, OneWeight(), samples=deadly, workers=1, steps=100) as trainer,
        pytest.raises(InputError, match=wanted),
    ):
        trainer.fit()
    with tiny_trainer(tmp_path, OneWeight(), start=trainer.saved, steps=trainer.step + 2) as again:  # without workers
        again.fit()
    assert curve(tmp_path) == whole(tmp_path / "whole", steps=trainer.step + 2)


# ---- what ends a process is said once
def run_cli(error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    def main(arguments: Any) -> None:
        raise error

    monkeypatch.setattr(parallel, "stop_processes", lambda: None)
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    return end.value.code, capsys.readouterr().err


GLOO = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:1")


def test_a_lost_process_is_one_message_and_what_follows_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = run_cli(GLOO, monkeypatch, capsys)
    assert code == os.EX_TEMPFAIL and said.startswith("error: process 0: another process of this run has ended or does")
    assert "--resume goes on from the last checkpoint" in said and said.count("\n") == 1
    assert run_cli(InputError("something"), monkeypatch, capsys) == (2, "")
    monkeypatch.setattr(parallel, "_reported", False)  # another process, which asks the store
    assert run_cli(InputError("something"), monkeypatch, capsys) == (2, "")


def test_a_process_lost_in_a_step_is_reported_while_signals_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    handlers = []
    monkeypatch.setattr("training.faults.report_end", lambda text: handlers.append(signal.getsignal(signal.SIGTERM)))
    with tiny_trainer(tmp_path, engine := OneWeight()) as trainer:
        engine.train_step = Mock(side_effect=GLOO)  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="Connection closed"):
            trainer.fit()
    assert len(handlers) == 1 and handlers[0] is not signal.getsignal(signal.SIGTERM)


def test_other_errors_are_not_taken_for_a_lost_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not parallel.is_lost(ValueError("gloo/")) and not parallel.is_lost(RuntimeError("shape"))
    with pytest.raises(RuntimeError, match="shape"):
        cli.run(lambda arguments: (_ for _ in ()).throw(RuntimeError("shape")))  # type: ignore[arg-type]
