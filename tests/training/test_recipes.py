"""Recipes are checked where they are read; the command line, a file and a checkpoint say the same things."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from training import checkpoint, cli
from training.assemble import assemble, freeze, open_samples
from training.catalog import CATALOG, DEMO, SFT
from training.cli import Command
from training.errors import InputError
from training.recipes import Recipe, read_recipe, resumed
from training.run import with_steps
from training.trainer import learning_rate


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("steps", 0, "more than 0"),
        ("steps", 1.5, "a whole number"),
        ("steps", True, "a whole number"),
        ("lr", -1.0, "more than 0"),
        ("lr", "1e-4", "a number"),
        ("warmup", -1, "0 or more"),
        ("dtype", "int8", "'float32', 'bfloat16'"),
        ("schedule", "linear", "'cosine', 'constant'"),
        ("zero_stage", 4, "0, 1, 2 or 3"),
        ("micro_batches", 3, "a multiple of micro_batches"),
        ("train", "head", "one or several of vision,adapter,language"),
        ("train", "", "one or several of"),
        ("adalrs_window", 2, "at least 3"),
        ("offload", 1, "true or false"),
        ("data", 3, "text"),
    ],
)
def test_recipe_names_field_value_and_what_is_wanted(field: str, value: object, wanted: str) -> None:
    with pytest.raises(InputError, match=f"Recipe: .*got .*want.*{wanted}"):
        Recipe(**{"adalrs": True, field: value})


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"zero_stage": 0, "dtype": "bfloat16"}, "float32 master weights"),
        ({"vision": "folder"}, "want both"),
        ({"lora_rank": 4, "zero_stage": 3}, "want 0 to 2"),
    ],
)
def test_what_does_not_go_together(values: dict[str, Any], wanted: str) -> None:
    with pytest.raises(InputError, match=wanted):
        Recipe(**values)


def test_a_whole_number_is_a_number() -> None:
    assert Recipe(lr=1).lr == 1.0 and isinstance(Recipe(lr=1).lr, float)


def test_every_recipe_of_the_catalog_is_whole() -> None:
    for name, entry in CATALOG.items():
        assert entry.summary and entry.plan and (name == "demo" or entry.plan[0].name == name)
        assert all(stage.streams % stage.micro_batches == 0 for stage in entry.plan)
    basic, sft = CATALOG["basic"].plan[0], CATALOG["sft-4"].plan[0]
    assert (basic.parts, basic.lr, basic.adalrs, basic.stream_length) == (("adapter",), 2e-4, True, 8192)
    assert sft.parts == ("vision", "adapter", "language") and sft.stream_length == 16384
    assert basic.streams * basic.stream_length == pytest.approx(2048 * 2000, rel=0.03)


# ---- the command line
def read(*arguments: str, recipe: str = "sft") -> Command:
    return cli.read(cli.parser("training", "", out="runs/none", recipe=recipe), arguments)


def test_every_field_of_the_recipe_is_a_flag_and_every_recipe_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        read("--help")
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert all("--" + entry.name.replace("_", "-") in shown for entry in fields(Recipe))
    assert all(name in "".join(shown.split()) for name in CATALOG)


def test_flags_override_fields_of_every_stage() -> None:
    plan, out, start, device = read("--lr", "1e-4", "--no-offload", "--dtype", "bfloat16", "--out", "here")
    assert plan == (replace(SFT, lr=1e-4, offload=False, dtype="bfloat16"),)
    assert (out, start, device) == (Path("here"), None, None)
    assert read("--recipe", "demo", "--steps", "7").plan == tuple(replace(stage, steps=7) for stage in DEMO)


@pytest.mark.parametrize("wrong", [["--stepz", "1"], ["--steps", "many"], ["--dtype", "int8"], ["--recipe", "none"]])
def test_bad_flags_end_with_usage(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        read(*wrong)
    assert end.value.code == 2 and wrong[0] in capsys.readouterr().err


def config(tmp_path: Path, text: str) -> str:
    (tmp_path / "mine.yaml").write_text(text)
    return str(tmp_path / "mine.yaml")


def test_a_file_in_place_of_options(tmp_path: Path) -> None:
    name = config(tmp_path, "recipe: demo\nseed: 3\nsave-every: 10\n")
    assert read("--config", name).plan == tuple(replace(stage, seed=3, save_every=10) for stage in DEMO)
    assert read("--config", name, "--seed", "4", "--recipe", "sft").plan == (replace(SFT, seed=4, save_every=10),)


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "+1.e-3", ".1e-2", "0.001", "1.0e-3"])
def test_numbers_of_a_file(number: str, tmp_path: Path) -> None:
    """PyYAML reads 1e-3, as it is written everywhere else, as text."""
    assert read("--config", config(tmp_path, f"lr: {number}\nname: 1e-3x")).plan == (
        replace(SFT, lr=1e-3, name="1e-3x"),
    )


def test_a_file_of_stages(tmp_path: Path) -> None:
    text = "lr: 0.5\nstages:\n- {name: one, train: adapter, steps: 2}\n- {steps: 3, lr: 0.25}\n"
    plan = read("--config", config(tmp_path, text), "--seed", "1").plan
    assert [(stage.name, stage.train, stage.steps, stage.lr, stage.seed) for stage in plan] == [
        ("one", "adapter", 2, 0.5, 1),
        ("stage-2", SFT.train, 3, 0.25, 1),
    ]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[", "--config: .*mine.yaml: "),
        ("3", "want a mapping"),
        ("stepz: 3", "got stepz, want options of a recipe"),
        ("recipe: none", "recipe: got 'none', want one of demo, sft"),
        ("stages: 3", "stages: got 3, want a list"),
        ("stages: [{stepz: 3}]", "got stepz, want options"),
        ("lr: fast", "lr: got 'fast', want a number"),
    ],
)
def test_what_a_file_gets_wrong(text: str, wrong: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=wrong):
        read("--config", config(tmp_path, text))


# ---- resumed runs
def written_checkpoint(run: Path, plan: tuple[Recipe, ...] = (Recipe(),), data: Any = None) -> Path:
    folder = run / "checkpoints" / checkpoint.step_name(4)
    folder.mkdir(parents=True)
    state = dict.fromkeys(checkpoint.KEYS) | {"step": 4, "stage": 0, "data": data}
    state["plan"] = [recipe.as_dict() for recipe in plan]
    (folder / "trainer.json").write_text(json.dumps(state))
    (run / "checkpoints" / "latest").write_text(folder.name + "\n")
    return folder


def test_resume_takes_recipe_and_folder_of_the_run(tmp_path: Path) -> None:
    folder = written_checkpoint(tmp_path, DEMO)
    plan = tuple(replace(stage, save_every=3) for stage in DEMO)
    start = checkpoint.Start(folder, checkpoint.read_state(folder))
    assert read("--resume", str(tmp_path), "--save-every", "3") == (plan, tmp_path, start, None)


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        (["--lr", "0.5"], "--resume: lr: the checkpoint was trained with 0.001, got 0.5"),
        (["--recipe", "sft"], "leave out --recipe"),
        (["--config", "mine.yaml"], "leave out --recipe and --config"),
    ],
)
def test_resume_refuses_what_would_bend_the_curve(changes: list[str], wrong: str, tmp_path: Path) -> None:
    written_checkpoint(tmp_path)
    with pytest.raises(InputError, match=wrong):
        read("--resume", str(tmp_path), *changes)


def test_a_run_folder_is_not_written_over(tmp_path: Path) -> None:
    folder = written_checkpoint(tmp_path / "one")
    written_checkpoint(tmp_path / "two")
    with pytest.raises(InputError, match="holds checkpoints; give --resume"):
        read("--out", str(tmp_path / "one"))
    with pytest.raises(InputError, match="holds checkpoints of another run"):
        read("--resume", str(folder), "--out", str(tmp_path / "two"))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file, want a folder"):
        read("--out", str(tmp_path / "file"))


def test_the_default_folder_is_the_next_free_one(tmp_path: Path) -> None:
    made = cli.parser("training", "", out=str(tmp_path / "run"), recipe="sft")
    assert cli.read(made, []).out == tmp_path / "run"
    for name in ("run", "run-2"):
        written_checkpoint(tmp_path / name)
    assert cli.read(made, []).out == tmp_path / "run-3"


def test_unknown_fields_of_a_checkpoint_are_an_error() -> None:
    with pytest.raises(InputError, match="--resume: .*colour"):
        resumed({**Recipe().as_dict(), "colour": 1}, {})
    assert read_recipe(Recipe().as_dict(), "here") == Recipe()


# ---- parts
QUESTIONS = [["what color is it", "red"], ["is there a circle", "yes"]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "all.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"picture": f"{n}.png", "questions": QUESTIONS}) + "\n" for n in "ab"))
    return path


def test_a_resumed_run_refuses_other_data(data: Path, tmp_path: Path) -> None:
    """Its tokenizer was trained on the data: trained anew, ids would mean other text, without a word."""
    recipe = Recipe(data=str(data))
    found = open_samples(recipe, assemble(recipe).processor).fingerprint
    folder = written_checkpoint(tmp_path / "run", data=found)
    start = checkpoint.Start(folder, checkpoint.read_state(folder))
    checkpoint.check_data(start, "data", found)
    data.write_text(data.read_text().replace("red", "sad"))
    edited = open_samples(recipe, assemble(recipe).processor).fingerprint
    with pytest.raises(InputError, match="trained on 2 records, sha256 .*, but all.jsonl has 2 records, sha256"):
        checkpoint.check_data(start, "all.jsonl", edited)


def test_a_resumed_run_has_the_checkpoints_tokenizer_and_config(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tables of this version may have changed."""
    fresh = assemble(Recipe(data=str(data)))
    fresh.processor.save_pretrained(tmp_path / "start" / checkpoint.MODEL)
    fresh.model.config.save_pretrained(tmp_path / "start" / checkpoint.MODEL)
    monkeypatch.setattr("training.assemble.build_processor", None)
    monkeypatch.setattr("training.assemble.MODELS", {})
    again = assemble(Recipe(data=str(data)), checkpoint.Start(tmp_path / "start", {}))
    assert again.processor.tokenizer.get_vocab() == fresh.processor.tokenizer.get_vocab()
    for part in ("text_config", "vision_config"):
        assert getattr(again.model.config, part).to_dict() == getattr(fresh.model.config, part).to_dict()


def test_a_model_from_an_export_or_a_run(data: Path, tmp_path: Path) -> None:
    fresh = assemble(Recipe(data=str(data)))
    fresh.processor.save_pretrained(tmp_path / "run" / "model")
    fresh.model.save_pretrained(tmp_path / "run" / "model")
    for folder in (tmp_path / "run", tmp_path / "run" / "model"):
        again = assemble(Recipe(data=str(data), model=str(folder), seed=9))
        assert all(
            torch_equal(again.model.state_dict()[name], value) for name, value in fresh.model.state_dict().items()
        )
    with pytest.raises(InputError, match="model: got 'nowhere', want one of demo, SAIL-VL2-1B"):
        assemble(Recipe(model="nowhere"))
    with pytest.raises(InputError, match="vision, language: .*nowhere"):
        assemble(Recipe(vision="nowhere", language="nowhere"))


def torch_equal(one: Any, other: Any) -> bool:
    return bool((one == other).all())


def test_only_the_parts_named_are_trained(data: Path) -> None:
    recipe = Recipe(data=str(data), train="adapter, vision")
    model = assemble(recipe).model
    freeze(model, recipe)
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = {name.split(".")[0] for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert trained == {"vision_model", "mlp1"} and frozen == {"language_model"}


def test_epochs_become_steps() -> None:
    recipe = Recipe(epochs=2.0, streams=4, data="easy_vqa")
    parts = assemble(recipe)
    samples = open_samples(recipe, parts.processor)
    tokens = 10 * sum(len(sample) for number in range(400) for sample in samples.sample(0, number))
    assert with_steps(recipe, parts).steps == pytest.approx(2 * tokens / (4 * 320), rel=0.05)
    assert with_steps(replace(recipe, epochs=0.0, steps=3), parts).steps == 3


def test_learning_rates() -> None:
    recipe = Recipe(lr=1.0, warmup=4, steps=12, lr_floor=0.2)
    assert [learning_rate(recipe, step, 1.0) for step in (0, 3, 4, 12)] == [0.25, 1.0, 1.0, 0.2]
    assert [learning_rate(replace(recipe, schedule="constant"), step, 2.0) for step in (0, 3, 11)] == [0.5, 2.0, 2.0]
