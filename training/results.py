"""The figures of a demo run as one small file that needs no other: what was run, on what, and what came out.

`python -m training.results runs/demo ...` keeps them with the benchmarks, in benchmarks/results/<device>/demo.json
(demo-blank.json for a run that was trained without looking).
"""

import json
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sail_ops import _library
from training import cli, parallel
from training.assemble import Parts
from training.checkpoint import replace_file, versions
from training.errors import InputError
from training.evaluate import Accuracy
from training.recipes import Recipe

RESULTS = "results.json"
ROOT = Path(__file__).parents[1]
KEPT = ROOT / "benchmarks" / "results"


def figures(
    plan: Sequence[Recipe],
    parts: Parts,
    first_step: int,
    seconds: Mapping[str, float],
    exact_match: Mapping[str, Accuracy],
) -> dict[str, Any]:
    """Everything about a run that its reader needs, without names of folders or of the host.

    `seconds` is this process's: of a resumed run, from `first_step` on.
    """
    return {
        "device": device_name(),
        "isa": _library.cpu_isa(),
        "threads": torch.get_num_threads(),
        "processes": parallel.world(),
        "versions": versions(),
        "commit": commit(),
        "recipe": [
            recipe.as_dict() | {"data": Path(recipe.data).name, "test": Path(recipe.test).name} for recipe in plan
        ],
        "first_step": first_step,
        "parameters": sum(parameter.numel() for parameter in parts.model.parameters()),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "exact_match": {
            name.strip(): {**accuracy._asdict(), "share": round(accuracy.share, 4)}
            for name, accuracy in exact_match.items()
        },
    }


def write(folder: Path, found: Mapping[str, Any]) -> Path:
    """`found` as folder/results.json, whole or not at all."""
    replace_file(folder / RESULTS, json.dumps(found, indent=1) + "\n")
    return folder / RESULTS


def keep(folder: Path) -> Path:
    """Copy a run's results to where benchmarks/ keeps its own of the same device; InputError where there are none."""
    path = folder / RESULTS
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text)
        blank = found["recipe"][-1]["blank_pictures"]
        kept = KEPT / found["device"] / ("demo-blank.json" if blank else "demo.json")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: want the results of a demo run: {error!r}") from error
    kept.parent.mkdir(parents=True, exist_ok=True)
    replace_file(kept, text)
    return kept


def device_name() -> str:
    """Brand, instruction set and threads of the CPU, as benchmarks/conftest.py names its folders."""
    from cpuinfo import get_cpu_info  # starts a process of its own: about a second

    brand = re.sub(r"\W+", "-", get_cpu_info().get("brand_raw", platform.machine()).lower())
    return f"cpu-{brand}-{_library.cpu_isa()}-{torch.get_num_threads()}t"


def commit() -> dict[str, Any] | None:
    """Id of the checkout's commit and whether files differ from it; None outside a checkout or without git."""
    if not (ROOT / ".git").exists():  # git would find the repository of some folder above
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        return {"id": git("rev-parse", "HEAD").strip(), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def main(folders: Sequence[str]) -> None:
    """Keep the results of these runs."""
    if not folders:
        raise InputError("python -m training.results: want the folders of one or more demo runs")
    for folder in folders:
        print(keep(Path(folder)))


if __name__ == "__main__":
    cli.run(main)
