"""Every number of the report's stages, held to the report; everything else says that it is ours, and why."""

from typing import Any

import pytest

from training.errors import InputError
from training.stages import STAGES, recipe_fields, table

ALL = ("vision", "adapter", "language")
# stage: what the report gives, with sections 4.1, 4.2, 4.4 in order; any other field of a stage is ours
REPORT: dict[str, dict[str, Any]] = {
    "vit-warm-up": dict(train=("adapter",), lr=2e-4, batch=1920, epochs=1),
    "vit-fine-grained": dict(train=("vision", "adapter"), lr=2e-5, batch=512),
    "vit-world-knowledge": dict(train=ALL, lr=1e-5, batch=512, epochs=1),
    "basic": dict(train=("adapter",), lr=2e-4, batch=2048, length=8192, tokens=128e9, adalrs=True),
    "multi-task": dict(train=ALL, length=8192, tokens=360e9, adalrs=False),
    "sft-1": dict(train=ALL, length=8192, tokens=42e9),
    "sft-2": dict(train=ALL, length=8192, tokens=40e9),
    "sft-3": dict(train=ALL, length=8192, tokens=16e9),
    "sft-4": dict(train=ALL, length=16384, tokens=70e9),
    "long-cot": dict(lr=1e-6, batch=1024, length=20480, tokens=4e8, epochs=1, schedule="cosine"),
    "think-fusion": dict(lr=1e-6, batch=1024, length=20480, tokens=1e9, epochs=1, schedule="cosine"),
}


@pytest.mark.parametrize("name", REPORT)
def test_the_reports_numbers(name: str) -> None:
    of_report = {key: v.value for key, v in STAGES[name].values() if v.source in ("4.1", "4.2", "4.4")}
    words = {"data", "loss_on"}
    assert {key: value for key, value in of_report.items() if key not in words} == REPORT[name]
    for key, value in STAGES[name].values():
        assert key in of_report or value.source.removeprefix("ours: ") != value.source, key


def test_stages_are_in_the_reports_order() -> None:
    assert list(STAGES) == list(REPORT)


def test_a_stage_as_fields_of_a_recipe() -> None:
    assert recipe_fields("basic") == dict(
        train=("adapter",), lr=2e-4, schedule="constant", stream_length=8192, batch=500, adalrs=True, steps=31250
    )
    assert recipe_fields("vit-warm-up")["epochs"] == 1 and "steps" not in recipe_fields("vit-warm-up")
    with pytest.raises(InputError, match="want one of vit-warm-up"):
        recipe_fields("rl")


def test_table_has_every_stage_and_marks_ours() -> None:
    lines = table().splitlines()
    assert len(lines) == 2 + len(STAGES) and len({line.count("|") for line in lines}) == 1
    assert "| sft-1 | all | Infinity-MM stage 2 | 1e-05* | 512* | 8192 | 42B | 1* |" in lines[7]
