"""Checkpoints in and out: experts one by one on disk, and the folders that SAIL-VL2 was released in.

Module names are the released state-dict names, so `from_pretrained` and `save_pretrained` need no table. What differs:
- experts are stacked in memory (`mlp.experts.gate_up_proj` [E, 2I, D]) and one by one on disk
  (`mlp.experts.0.gate_proj.weight` [I, D], ...), as transformers does for Qwen3-MoE; stacked files load too;
- a tied `lm_head` may be stored or not; stored with other values than the embeddings, it is kept apart, with a warning;
- the released config.json says `llm_config` and `sailvl` where ours says `text_config` and `sail_vl2`.
"""

import json
from pathlib import Path
from typing import Any, cast

from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from .config import SailVL2Config
from .model import SailVL2ForConditionalGeneration

register_checkpoint_conversion_mapping(
    SailVL2Config.model_type, get_checkpoint_conversion_mapping("qwen3_moe"), overwrite=True
)


def load_released(folder: str | Path, **kwargs: Any) -> SailVL2ForConditionalGeneration:
    """The model in a folder as SAIL-VL2 was released: config.json and safetensors; its Python files are not run.

    `kwargs` are `from_pretrained`'s. Raises ValueError for a config that is not SAIL-VL2's, and where the file lacks
    a weight or holds one that has no place.
    """
    config = released_config(json.loads((Path(folder) / "config.json").read_text()))
    loaded: Any = SailVL2ForConditionalGeneration.from_pretrained(
        folder, config=config, output_loading_info=True, **kwargs
    )
    model, report = loaded
    faults = {kind: sorted(report[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(faults.values()):
        raise ValueError(f"load_released: {folder} does not fit its config.json: {faults}")
    return cast(SailVL2ForConditionalGeneration, model)


def released_config(released: dict[str, Any]) -> SailVL2Config:
    """Our configuration for a released config.json."""
    if released.get("model_type") != "sailvl" or "llm_config" not in released:
        raise ValueError(
            f"released_config: wanted model_type 'sailvl' and an llm_config, got"
            f" {released.get('model_type')!r} and {sorted(released)}"
        )
    vision = released["vision_config"] | {"image_size": released["force_image_size"]}
    return SailVL2Config(
        vision_config=vision,
        text_config=released["llm_config"],
        downsample_ratio=released["downsample_ratio"],
        ps_version=released["ps_version"],
        select_layer=released["select_layer"],
    )
