"""Model soup: the average is exact, loads, and refuses what is not one model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import lively_model, tiny_config

from sail_model import SailVL2ForConditionalGeneration
from training.errors import InputError
from training.soup import soup


def export(folder: Path, seed: int, *, tied: bool = True, shard: str = "50GB", dtype: str = "float32") -> Path:
    model = lively_model(tiny_config(True, tie_word_embeddings=tied), seed).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [export(tmp_path / "a", 0), export(tmp_path / "b", 1)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["50GB", "100KB"])
def test_average_is_rounded_once_and_loads(tmp_path: Path, tied: bool, shard: str) -> None:
    folders = [export(tmp_path / str(seed), seed, tied=tied, shard=shard, dtype="bfloat16") for seed in range(3)]
    warnings = soup(tmp_path / "out", folders, [1, 2, 5])
    found = SailVL2ForConditionalGeneration.from_pretrained(tmp_path / "out")
    sources = [SailVL2ForConditionalGeneration.from_pretrained(folder).state_dict() for folder in folders]
    for name, weight in found.state_dict().items():
        first, second, third = (source[name].double() for source in sources)
        assert torch.equal(weight, (first * 0.125 + second * 0.25 + third * 0.625).bfloat16()), name
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (shard == "100KB")
    assert len(warnings) == 2 and "different runs" in warnings[0]


def test_models_of_one_run_give_no_warning(tmp_path: Path, folders: list[Path]) -> None:
    near = load_file(folders[0] / "model.safetensors")
    save_file({name: weight * 1.01 for name, weight in near.items()}, folders[1] / "model.safetensors")
    assert soup(tmp_path / "out", folders) == []


def test_how_a_model_was_loaded_is_no_difference(tmp_path: Path, folders: list[Path]) -> None:
    again = SailVL2ForConditionalGeneration.from_pretrained(folders[1], dtype=torch.float32)
    again.save_pretrained(tmp_path / "again")
    configs = [json.loads((folder / "config.json").read_text()) for folder in (folders[0], tmp_path / "again")]
    assert configs[0] != configs[1], "a loaded model names the dtype of each part"
    soup(tmp_path / "out", [folders[0], tmp_path / "again"])
    assert (tmp_path / "out" / "model.safetensors").is_file()


def change_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["downsample_ratio"] = 0.25
    (folder / "config.json").write_text(json.dumps(config))


def change_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["mlp1.0.weight"] = weights["mlp1.0.weight"][:-1].clone()
    save_file(weights, folder / "model.safetensors")


def drop_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["mlp1.0.weight"]
    save_file(weights, folder / "model.safetensors")


def add_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def drop_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change_config, "downsample_ratio differs"),
        (change_shape, "mlp1.0.weight: got"),
        (drop_tensor, "has no tensor mlp1.0.weight"),
        (add_tokenizer, "tokenizer.json is in only one"),
        (drop_weights, "no model.safetensors"),
    ],
)
def test_what_is_not_one_model_is_refused(tmp_path: Path, folders: list[Path], spoil, message: str) -> None:  # type: ignore[no-untyped-def]
    spoil(folders[1])
    with pytest.raises(InputError, match=message):
        soup(tmp_path / "out", folders)
    assert not (tmp_path / "out").exists()


def test_arguments_that_do_not_fit_are_refused(tmp_path: Path, folders: list[Path]) -> None:
    with pytest.raises(InputError, match="at least 2"):
        soup(tmp_path / "out", folders[:1])
    for weights in ([1.0], [1.0, -1.0], [0.0, 0.0]):
        with pytest.raises(InputError, match="--weights"):
            soup(tmp_path / "out", folders, weights)
    with pytest.raises(InputError, match="exists already"):
        soup(folders[0], folders)


def test_a_write_that_fails_leaves_no_model(
    tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(OSError, match="no space"):
        soup(tmp_path / "out", folders)
    assert not (tmp_path / "out").exists()
