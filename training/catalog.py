"""The recipes by name: the demo's stages, supervised fine-tuning, and each stage of the report."""

from typing import NamedTuple

from training.recipes import Recipe
from training.stages import STAGES, recipe_fields


class Entry(NamedTuple):
    """A recipe's stages and one line about it."""

    summary: str
    plan: tuple[Recipe, ...]


DEMO = (Recipe(name="all", steps=2400, test="easy_vqa:test", streams=4, workers=1),)
SFT = Recipe(name="sft", lr=1e-5, steps=1000, stream_length=8192, streams=16, warmup=30)

CATALOG: dict[str, Entry] = {
    "demo": Entry("a small SAIL-VL2-MoE on easy-vqa, in stages", DEMO),
    "sft": Entry("supervised fine-tuning of all weights on conversations of your own", (SFT,)),
    **{stage.name: Entry(stage.summary, (Recipe(**recipe_fields(stage)),)) for stage in STAGES},
}
