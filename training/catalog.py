"""The recipes by name: the demo's stages, supervised fine-tuning, and each stage of the report."""

from typing import NamedTuple

from training import stages
from training.recipes import Recipe


class Entry(NamedTuple):
    """A recipe's stages and one line about it."""

    summary: str
    plan: tuple[Recipe, ...]


def _demo(name: str, data: str, steps: int, warmup: int, **changes: float | str) -> Recipe:
    """A stage of the demo. One that ends where its answers are learned keeps its rate; `steps` is then the most."""
    fields = {"lr": 3e-4, "beta2": 0.95, "data": data, "steps": steps, "warmup": warmup, "workers": 1, **changes}
    if "until_loss" in fields:
        fields["schedule"] = "constant"
    return Recipe(name=name, test="easy_vqa:test", streams=2, stream_length=640, **fields)  # type: ignore[arg-type]


# what each is for, and what did not work: docs/decisions/training-demo.md
DEMO = (
    # shapes are learned all at once, after some hundred steps at chance; so are yes and no
    _demo("vision warm-up", "easy_vqa:shapes", 600, 50, vision_lr=3.0, until_loss=0.12),
    _demo("vision", "easy_vqa:shapes-and-colors", 400, 20, vision_lr=3.0, until_loss=0.1),
    _demo("balanced", "easy_vqa:balanced", 1600, 20, until_loss=0.06),
    _demo("last", "easy_vqa", 250, 20),
)
SFT = Recipe(name="sft", lr=1e-5, steps=1000, stream_length=8192, streams=16, warmup=30)


def _report_stage(name: str) -> Entry:
    """A stage of the report; ours: 3% of the steps warm up, a micro-batch has at most 16 streams."""
    found, of_stage = stages.stage(name), stages.recipe_fields(name)
    streams = 16 * -(-of_stage.pop("batch") // 16)
    plan = Recipe(
        name=name,
        **of_stage | {"train": ",".join(of_stage["train"])},
        streams=streams,
        micro_batches=streams // 16,
        warmup=max(1, round(0.03 * of_stage.get("steps", 1000))),
        dtype="bfloat16",
        picture_balance=True,
        candidates=128,
        workers=4,
        gradient_checkpointing=True,
    )
    return Entry(f"{' and '.join(found.train.value)} on {found.data.value}", (plan,))


CATALOG: dict[str, Entry] = {
    "demo": Entry("a small SAIL-VL2-MoE on easy-vqa, in stages", DEMO),
    "sft": Entry("supervised fine-tuning of all weights on conversations of your own", (SFT,)),
    **{name: _report_stage(name) for name in stages.STAGES},
}
