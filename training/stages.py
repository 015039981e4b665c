"""The stages of the SAIL-VL2 report (arXiv 2509.14033) as plain data; what it leaves open is marked as ours.

The report counts a batch in samples, a recipe here in streams of packed tokens. The conversion is ours: the report's
basic stage has 128B tokens in 64M samples, 2000 a sample, so a step has batch x 2000 tokens.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from training.errors import InputError

TOKENS_PER_SAMPLE = 2000  # 128B / 64M, section 4.2


class Value(NamedTuple):
    """A number or word of a stage: `source` is the report's section, or "ours: " and the reason."""

    value: Any
    source: str


def ours(value: Any, reason: str) -> Value:
    """A value that the report leaves open."""
    return Value(value, f"ours: {reason}")


@dataclass(frozen=True)
class Stage:
    """One stage: which parts are trained, how, on what. `batch` in samples, `length` and `tokens` in tokens."""

    train: Value  # parts: vision, adapter, language
    data: Value
    lr: Value  # peak
    batch: Value
    length: Value
    tokens: Value  # None: epochs decide
    epochs: Value
    schedule: Value
    adalrs: Value
    loss_on: Value

    def values(self) -> Iterator[tuple[str, Value]]:
        """(field, value), in order."""
        return ((entry.name, getattr(self, entry.name)) for entry in fields(self))


ALL = ("vision", "adapter", "language")
WHOLE_PASS = ours(1, "the report gives tokens or samples, not passes")
BY_EPOCH = ours(None, "the report gives passes or samples")
COSINE = ours("cosine", "as LongCoT SFT has it")
LENGTH = ours(8192, "as pre-training has it")
NO_SEARCH = ours(False, "named for basic pre-training alone")
ANSWERS = ours("answers", "instruction tuning learns what the assistant says")


def _vit(train: tuple[str, ...], data: str, lr: float, batch: int, epochs: Value) -> Stage:
    """A stage of SAIL-ViT, section 4.1."""
    return Stage(
        train=Value(train, "4.1"),
        data=Value(data, "4.1"),
        lr=Value(lr, "4.1"),
        batch=Value(batch, "4.1"),
        length=LENGTH,
        tokens=BY_EPOCH,
        epochs=epochs,
        schedule=COSINE,
        adalrs=NO_SEARCH,
        loss_on=Value("answers", "4.1"),
    )


def _sft(data: str, tokens: float, length: int) -> Stage:
    """A phase of basic SFT, section 4.4."""
    return Stage(
        train=Value(ALL, "4.4"),
        data=Value(data, "4.4"),
        lr=ours(1e-5, "as the last ViT stage, which trains all parts on instructions too"),
        batch=ours(512, "as the last ViT stage"),
        length=Value(length, "4.4"),
        tokens=Value(tokens, "4.4"),
        epochs=WHOLE_PASS,
        schedule=COSINE,
        adalrs=NO_SEARCH,
        loss_on=ANSWERS,
    )


def _thinking(data: str, tokens: float, loss_on: str) -> Stage:
    """A stage of thinking, section 4.4 and Table 4."""
    return Stage(
        train=ours(ALL, "as basic SFT"),
        data=Value(data, "4.4"),
        lr=Value(1e-6, "4.4"),
        batch=Value(1024, "4.4"),
        length=Value(20480, "4.4"),
        tokens=Value(tokens, "4.4"),
        epochs=Value(1, "4.4"),
        schedule=Value("cosine", "4.4"),
        adalrs=NO_SEARCH,
        loss_on=Value(loss_on, "4.4"),
    )


STAGES: dict[str, Stage] = {
    "vit-warm-up": _vit(("adapter",), "8M: 4.9M SAIL-Caption, 3.1M IDL-WDS OCR", 2e-4, 1920, Value(1, "4.1")),
    "vit-fine-grained": _vit(
        ("vision", "adapter"), "warm-up's, 6.7M captions, DocStruct, video captions", 2e-5, 512, WHOLE_PASS
    ),
    "vit-world-knowledge": _vit(ALL, "36.5M: captions, OCR, QA, math, short QA, text", 1e-5, 512, Value(1, "4.1")),
    "basic": Stage(
        train=Value(("adapter",), "4.2"),
        data=Value("64M samples, balanced over data sets", "4.2"),
        lr=Value(2e-4, "4.2"),
        batch=Value(2048, "4.2"),
        length=Value(8192, "4.2"),
        tokens=Value(128e9, "4.2"),
        epochs=WHOLE_PASS,
        schedule=ours("constant", "AdaLRS compares slopes, which a falling rate would change"),
        adalrs=Value(True, "4.2"),
        loss_on=ANSWERS,
    ),
    "multi-task": Stage(
        train=Value(ALL, "4.2"),
        data=Value("180M samples, half understanding, half instruction, balanced over n-grams", "4.2"),
        lr=ours(2e-5, "between basic's and SFT's"),
        batch=ours(2048, "as the basic stage"),
        length=Value(8192, "4.2"),
        tokens=Value(360e9, "4.2"),
        epochs=WHOLE_PASS,
        schedule=COSINE,
        adalrs=Value(False, "4.2"),
        loss_on=ANSWERS,
    ),
    "sft-1": _sft("Infinity-MM stage 2", 42e9, 8192),
    "sft-2": _sft("SAIL-Instruction2", 40e9, 8192),
    "sft-3": _sft("LLaVA-CoT, MMPR, Condor", 16e9, 8192),
    "sft-4": _sft("pictures and videos 1:1", 70e9, 16384),
    "long-cot": _thinking("400K long chains of thought", 0.4e9, "thoughts and answers"),
    "think-fusion": _thinking("1M: 900K direct, 100K with thoughts", 1e9, "thoughts and answers; direct: answers"),
}


def stage(name: str) -> Stage:
    """The stage of that name. Raises InputError listing the names."""
    if name not in STAGES:
        raise InputError(f"stage: got {name!r}, want one of {', '.join(STAGES)}")
    return STAGES[name]


def streams_per_step(found: Stage) -> int:
    """Streams of `length` tokens that hold a step's samples: ceil(batch x 2000 / length)."""
    return math.ceil(found.batch.value * TOKENS_PER_SAMPLE / found.length.value)


def recipe_fields(name: str) -> dict[str, Any]:
    """Stage -> fields of a training recipe: train, lr, schedule, stream_length, batch (streams a step, all ranks),
    adalrs, and `steps` where the report gives tokens, else `epochs`."""
    found = stage(name)
    batch = streams_per_step(found)
    made = {
        "train": found.train.value,
        "lr": found.lr.value,
        "schedule": found.schedule.value,
        "stream_length": found.length.value,
        "batch": batch,
        "adalrs": found.adalrs.value,
    }
    if found.tokens.value is None:
        return made | {"epochs": found.epochs.value}
    return made | {"steps": round(found.tokens.value / (batch * found.length.value))}


def table() -> str:
    """All stages as Markdown; * marks what is ours."""
    names = [entry.name for entry in fields(Stage)]
    rows = [["stage", *names], ["---"] * (len(names) + 1)]
    rows += [[name, *(_cell(value) for _, value in found.values())] for name, found in STAGES.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(value: Value) -> str:
    found = value.value
    if isinstance(found, tuple):
        text = "all" if found == ALL else ", ".join(found)
    elif isinstance(found, bool):
        text = "on" if found else "off"
    elif found is None:
        text = "-"
    else:
        text = f"{found / 1e9:g}B" if isinstance(found, float) and found > 1e6 else str(found)
    return text + ("*" if value.source.startswith("ours") else "")
