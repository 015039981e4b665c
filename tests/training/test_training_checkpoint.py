"""Checkpoints are whole or not there; recipes, flags, schedule and metrics keep a resumed run on its curve."""

import importlib
import json
import math
import signal
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from training import checkpoint, cli
from training.assemble import assemble
from training.errors import InputError
from training.interrupt import Watch
from training.metrics import MetricsLog, activation_entropy, read_lines
from training.recipes import Recipe, resumed
from training.schedule import cosine_with_warmup


def nothing() -> None:
    pass


def publish(root: Path, step: int, write: Callable[[Path], None] | None = None, keep: int = 2) -> Path:
    def default(folder: Path) -> None:
        (folder / "weights").write_text(f"weights of step {step}")

    state = {"step": step, "world": 1, "recipe": Recipe().as_dict()}
    return checkpoint.publish(root, step, state, write or default, is_first=True, barrier=nothing, keep=keep)


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


# ---- recipes and flags
@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("steps", 0, "more than 0"),
        ("lr", -1.0, "more than 0"),
        ("warmup", -1, "0 or more"),
        ("dtype", "int8", "'float32', 'bfloat16'"),
        ("zero_stage", 3, "0, 2"),
        ("data", "nowhere.jsonl", "a file that exists"),
    ],
)
def test_recipe_names_field_value_and_what_is_wanted(field: str, value: object, wanted: str) -> None:
    with pytest.raises(InputError, match=f"Recipe: {field}: got {value!r}, want.*{wanted}"):
        Recipe(**{field: value})


def read(*arguments: str) -> tuple[Recipe, Path, Path | None]:
    return cli.read(cli.parser("training", "", out="runs/none"), arguments)


def test_every_field_of_the_recipe_is_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        read("--help")
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert all("--" + entry.name.replace("_", "-") in shown for entry in fields(Recipe))


def test_flags_override_fields() -> None:
    recipe, out, start = read("--steps", "7", "--lr", "1e-4", "--no-offload", "--dtype", "bfloat16", "--out", "here")
    assert recipe == Recipe(steps=7, lr=1e-4, offload=False, dtype="bfloat16")
    assert out == Path("here") and start is None


@pytest.mark.parametrize("wrong", [["--stepz", "1"], ["--steps", "many"], ["--zero-stage", "x"], ["--dtype", "int8"]])
def test_bad_flags_end_with_usage(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        read(*wrong)
    assert end.value.code == 2 and wrong[0] in capsys.readouterr().err


def test_resume_takes_recipe_and_folder_of_the_run(tmp_path: Path) -> None:
    written = publish(tmp_path / "checkpoints", 4)
    recipe, out, start = read("--resume", str(tmp_path), "--save-every", "3")
    assert (recipe, out, start) == (Recipe(save_every=3), tmp_path, written)


def test_the_help_of_model_names_a_table_that_exists() -> None:
    (text,) = (entry.metadata["help"] for entry in fields(Recipe) if entry.name == "model")
    module, table = text.split()[-1].rsplit(".", 1)
    assert Recipe().model in getattr(importlib.import_module(module), table)


def test_resume_refuses_what_would_bend_the_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path / "checkpoints", 4)
    with pytest.raises(InputError, match="--resume: lr: the checkpoint was trained with 0.001, got 0.5"):
        read("--resume", str(tmp_path), "--lr", "0.5")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="written by 1 processes, this run has 2"):
        read("--resume", str(tmp_path))


def test_a_run_folder_is_not_written_over(tmp_path: Path) -> None:
    publish(tmp_path / "checkpoints", 4)
    with pytest.raises(InputError, match="holds checkpoints"):
        read("--out", str(tmp_path))


def test_the_default_folder_is_the_next_free_one(tmp_path: Path) -> None:
    made = cli.parser("training", "", out=str(tmp_path / "run"))
    assert cli.read(made, [])[1] == tmp_path / "run"
    publish(tmp_path / "run" / "checkpoints", 1)
    publish(tmp_path / "run-2" / "checkpoints", 1)
    assert cli.read(made, [])[1] == tmp_path / "run-3"


def test_unknown_fields_of_a_checkpoint_are_an_error() -> None:
    with pytest.raises(InputError, match="--resume: .*colour"):
        resumed({**Recipe().as_dict(), "colour": 1}, {})


# ---- what gives the numbers their meaning
QUESTIONS = [["what color is it", "red"], ["is there a circle", "yes"]]
PICTURES = ("a.png", "b.png")


def write_data(path: Path, questions: list[list[str]] = QUESTIONS, pictures: tuple[str, ...] = PICTURES) -> Recipe:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"picture": name, "questions": questions}) + "\n" for name in pictures))
    return Recipe(data=str(path))


def publish_parts(root: Path, recipe: Recipe) -> Path:
    """A checkpoint with the files that `Trainer.save` writes beside the engine's."""
    parts = assemble(recipe)

    def write(folder: Path) -> None:
        parts.processor.save_pretrained(folder / checkpoint.MODEL)
        parts.model.config.save_pretrained(folder / checkpoint.MODEL)

    state = {"step": 1, "world": 1, "recipe": recipe.as_dict(), "data": parts.data}
    return checkpoint.publish(root, 1, state, write, is_first=True, barrier=nothing)


EDITS: dict[str, dict[str, Any]] = {
    "a question": {"questions": [["which color has it", "red"], QUESTIONS[1]]},
    "an answer": {"questions": [["what color is it", "blue"], QUESTIONS[1]]},
    "the order of pictures": {"pictures": ("b.png", "a.png")},
    "a picture's name": {"pictures": ("a.png", "c.png")},
    "a record more": {"pictures": ("a.png", "b.png", "c.png")},
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_a_resumed_run_refuses_edited_data(tmp_path: Path, edit: dict[str, Any]) -> None:
    """Its tokenizer was trained on the data: trained anew, ids would mean other text, without a word."""
    start = publish_parts(tmp_path / "checkpoints", write_data(tmp_path / "data" / "all.jsonl"))
    recipe = write_data(tmp_path / "data" / "all.jsonl", **edit)
    with pytest.raises(InputError, match="trained on 2 records, sha256 .*, but .*all.jsonl has [23] records, sha256"):
        assemble(recipe, start)


def test_a_resumed_run_has_the_checkpoints_tokenizer_and_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its data may have moved; the tables of this version may have changed."""
    recipe = write_data(tmp_path / "data" / "all.jsonl")
    fresh, start = assemble(recipe), publish_parts(tmp_path / "checkpoints", recipe)
    (tmp_path / "data").rename(tmp_path / "moved")
    monkeypatch.setattr("training.assemble.build_processor", None)
    monkeypatch.setattr("training.assemble.MODELS", {})
    again = assemble(Recipe(data=str(tmp_path / "moved" / "all.jsonl")), start)
    assert again.processor.tokenizer.get_vocab() == fresh.processor.tokenizer.get_vocab()
    assert [(s.prefix_ids, s.branches) for s in again.samples] == [(s.prefix_ids, s.branches) for s in fresh.samples]
    for part in ("text_config", "vision_config"):
        assert getattr(again.model.config, part).to_dict() == getattr(fresh.model.config, part).to_dict()


def test_a_checkpoint_without_its_meaning_is_refused(tmp_path: Path) -> None:
    start = publish(tmp_path / "checkpoints", 4)
    with pytest.raises(InputError, match="too old, it has no model/ folder or no fingerprint of its data"):
        assemble(write_data(tmp_path / "data.jsonl"), start)


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


def test_watch_notes_the_first_signal_and_restores_the_handlers() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Watch() as watch:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # the launcher passing it on: no second request
        assert watch.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


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
