"""The stages of SAIL-VL2's report as data: what each trains, at which rate, on how much.

Every value is the report's, with its section, or ours, with the reason. The report counts a batch in samples, we in
packed streams: a stream of L tokens holds about L / 2,000 of its samples (section 3: 128B tokens of 64M samples in
basic pre-training, 360B of 180M in multi-task pre-training: 2,000 tokens a sample), so a batch of N samples is
N * 2,000 / L streams. Source: arXiv 2509.14033, sections 2.1, 3.2 and 4.
"""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")
TOKENS_A_SAMPLE = 2000


@dataclass(frozen=True)
class Value(Generic[T]):
    """A value and where it comes from: a section of the report, or "ours: reason"."""

    value: T
    source: str


@dataclass(frozen=True)
class Stage:
    """One stage. `batch` is in samples, `tokens` is the length of the stage as the report has it, in billions."""

    name: str
    summary: str
    train: Value[str]
    lr: Value[float]
    batch: Value[int]
    length: Value[int]
    tokens: Value[float]
    data: str
    adalrs: bool = False


def report(value: T, section: str) -> Value[T]:
    """A value of the report."""
    return Value(value, section)


def ours(value: T, reason: str) -> Value[T]:
    """A value that the report leaves open."""
    return Value(value, f"ours: {reason}")


ALL = "vision,adapter,language"
_VIT = "2.1"
_VIT_LENGTH = ours(8192, "as pre-training has it")
_VIT_TOKENS = ours(40.0, "a third of the 121B tokens of the three")
_SFT_RATE = ours(1e-5, "the last rate that the report names for training all parts, of ViT stage III")
_SFT_BATCH = ours(512, "as ViT stage III, the last stage that trains all parts and names one")
_THINK_LENGTH = report(20480, "Table 4")

STAGES = (
    Stage(
        "vit-warm-up",
        "SAIL-ViT I: the adapter learns to speak to the language model",
        report("adapter", _VIT),
        report(2e-4, _VIT),
        report(1920, _VIT),
        _VIT_LENGTH,
        _VIT_TOKENS,
        "8M: 4.9M SAIL-Caption, 3.1M OCR of IDL-WDS; one epoch",
    ),
    Stage(
        "vit-fine-grained",
        "SAIL-ViT II: encoder and adapter on captions, documents and videos",
        report("vision,adapter", _VIT),
        report(2e-5, _VIT),
        report(512, _VIT),
        _VIT_LENGTH,
        _VIT_TOKENS,
        "that of I, and 6.7M captions, DocStruct, captions of videos",
    ),
    Stage(
        "vit-world-knowledge",
        "SAIL-ViT III: all parts on captions, OCR, questions, mathematics and text",
        report(ALL, _VIT),
        report(1e-5, _VIT),
        report(512, _VIT),
        _VIT_LENGTH,
        _VIT_TOKENS,
        "36.5M; one epoch",
    ),
    Stage(
        "basic-pretraining",
        "basic multimodal pre-training: a fresh adapter alone, its rate searched by AdaLRS",
        report("adapter", "3.2, Table 3"),
        report(2e-4, "3.2"),
        report(2048, "3.2"),
        report(8192, "3.2"),
        report(128.0, "3.2"),
        "64M samples, sources balanced",
        adalrs=True,
    ),
    Stage(
        "multi-task-pretraining",
        "multi-task pre-training: all parts, half understanding and half instructions",
        report(ALL, "3.2"),
        ours(5e-5, "between basic pre-training and the encoder's stage III"),
        ours(2048, "as basic pre-training"),
        report(8192, "3.2"),
        report(360.0, "3.2"),
        "180M samples, n-grams rebalanced",
    ),
    Stage(
        "sft-1",
        "basic SFT 1: broad instructions",
        *(report(ALL, "4.1"), _SFT_RATE, _SFT_BATCH, report(8192, "4.1"), report(42.0, "4.1")),
        "Infinity-MM stage 2",
    ),
    Stage(
        "sft-2",
        "basic SFT 2: selected instructions",
        *(report(ALL, "4.1"), _SFT_RATE, _SFT_BATCH, report(8192, "4.1"), report(40.0, "4.1")),
        "SAIL-Instruction2",
    ),
    Stage(
        "sft-3",
        "basic SFT 3: reasoning",
        *(report(ALL, "4.1"), _SFT_RATE, _SFT_BATCH, report(8192, "4.1"), report(16.0, "4.1")),
        "LLaVA-CoT, MMPR, Condor",
    ),
    Stage(
        "sft-4",
        "basic SFT 4: pictures and videos, one to one",
        *(report(ALL, "4.1"), _SFT_RATE, _SFT_BATCH, report(16384, "4.1"), report(70.0, "4.1")),
        "pictures and videos 1:1",
    ),
    Stage(
        "long-cot-sft",
        "LongCoT SFT: thoughts and answers are both learned",
        *(report(ALL, "4.2"), report(1e-6, "4.2"), report(1024, "4.2"), _THINK_LENGTH, report(0.4, "4.2")),
        "400K chains of thought; one epoch",
    ),
    Stage(
        "think-fusion-sft",
        "Think-Fusion SFT: direct answers and thoughts in one model",
        *(report(ALL, "4.2"), report(1e-6, "4.2"), report(1024, "4.2"), _THINK_LENGTH, report(1.0, "4.2")),
        "1M: 900K direct answers, 100K thoughts that passed rejection sampling; one epoch",
    ),
)


def recipe_fields(stage: Stage) -> dict[str, Any]:
    """The stage in `training.recipes.Recipe`'s terms; ours: 3% warm-up, cosine, a micro-batch of 8 streams."""
    length = stage.length.value
    streams = max(8, round(stage.batch.value * TOKENS_A_SAMPLE / length / 8) * 8)
    steps = max(1, round(stage.tokens.value * 1e9 / (streams * length)))
    return {
        "name": stage.name,
        "train": stage.train.value,
        "lr": stage.lr.value,
        "stream_length": length,
        "streams": streams,
        "micro_batches": streams // 8,
        "steps": steps,
        "warmup": max(1, round(0.03 * steps)),
        "adalrs": stage.adalrs,
        "dtype": "bfloat16",
        "picture_balance": True,
        "candidates": 128,
        "workers": 4,
        "gradient_checkpointing": True,
    }
