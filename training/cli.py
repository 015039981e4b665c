"""The command line of everything that trains: a recipe by name, options or a YAML file, a folder, or --resume."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import yaml

from training import checkpoint, parallel
from training.catalog import CATALOG
from training.errors import InputError
from training.faults import lost_process, report_end
from training.interrupt import Interrupted
from training.recipes import Recipe, read_recipe, resumed
from training.yaml_numbers import safe_load

Plan = tuple[Recipe, ...]


class Command(NamedTuple):
    """What the command line asks for: the stages, the folder of the run, a checkpoint to go on from, a device."""

    plan: Plan
    out: Path
    start: checkpoint.Start | None
    device: str | None


def parser(program: str, description: str, out: str, recipe: str) -> argparse.ArgumentParser:
    """--recipe, --config, --out, --resume, --device, and one option for each field of `Recipe`."""
    made = argparse.ArgumentParser(
        prog=f"python -m {program}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.set_defaults(default_out=Path(out))
    made.add_argument("--recipe", default=argparse.SUPPRESS, choices=CATALOG, metavar="NAME", help=_recipes(recipe))
    made.set_defaults(default_recipe=recipe)
    made.add_argument("--config", type=Path, metavar="YAML", help="a file of options, and of `stages:` with their own")
    made.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"folder of the run (default: the next free of {out}, {out}-2, ..., or the resumed run)",
    )
    made.add_argument(
        "--resume", type=Path, metavar="DIR", help="go on from this checkpoint, or the latest of this run"
    )
    made.add_argument("--device", metavar="KIND", help="cuda, npu or cpu (default: the first of them that is there)")
    groups: dict[str, Any] = {}
    types = get_type_hints(Recipe)
    for entry in fields(Recipe):
        group = entry.metadata["group"]
        if group not in groups:
            groups[group] = made.add_argument_group(f"{group} (of every stage)")
        assert entry.default is not MISSING
        groups[group].add_argument(
            "--" + entry.name.replace("_", "-"),
            default=argparse.SUPPRESS,
            help=f"{entry.metadata['help']} (default: {entry.default!r})".replace("%", "%%"),
            **_how_to_read(types[entry.name]),
        )
    return made


def _recipes(default: str) -> str:
    names = "; ".join(f"{name}: {entry.summary}" for name, entry in CATALOG.items())
    return f"what to train, by default {default!r}. {names}".replace("%", "%%")


def _how_to_read(kind: Any) -> dict[str, Any]:
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if choices := get_args(kind):
        return {"type": type(choices[0]), "choices": choices}
    return {"type": kind, "metavar": kind.__name__.upper()}


def read(made: argparse.ArgumentParser, arguments: Sequence[str]) -> Command:
    """The command. Raises InputError for what makes no sense together."""
    given = made.parse_args(arguments)
    changes = {entry.name: getattr(given, entry.name) for entry in fields(Recipe) if hasattr(given, entry.name)}
    if given.resume is not None:
        return _go_on(given, changes)
    out = given.out or _unused(given.default_out)
    if _holds_a_run(out):
        raise InputError(f"--out: {out}: holds checkpoints; give --resume {out} or another --out")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: {out}: is a file, want a folder")
    return Command(
        plan_of(getattr(given, "recipe", None), given.config, changes, given.default_recipe), out, None, given.device
    )


def plan_of(recipe: str | None, config: Path | None, changes: dict[str, Any], default: str) -> Plan:
    """The stages of `recipe`, with the options of the file `config`, with `changes`: the later wins."""
    options = {} if config is None else _read_yaml(config)
    stages = options.pop("stages", None)
    named = options.pop("recipe", default)
    name = recipe or named
    if name not in CATALOG:
        raise InputError(f"{config}: recipe: got {name!r}, want one of {', '.join(CATALOG)}")
    plan = CATALOG[name].plan
    if stages is not None:
        plan = _stages_of(config, stages, {**plan[0].as_dict(), **options})
        options = {}
    read_recipe(options, f"{config}")
    return tuple(replace(stage, **{**options, **changes}) for stage in plan)


def _stages_of(config: Path | None, stages: Any, common: dict[str, Any]) -> Plan:
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise InputError(f"{config}: stages: got {stages!r}, want a list of mappings from option to value")
    names = [{"name": f"stage-{n}", **stage} for n, stage in enumerate(stages, start=1)]
    return tuple(read_recipe({**common, **stage}, f"{config}: stages") for stage in names)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        found = safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"--config: {path}: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"--config: {path}: got {type(found).__name__}, want a mapping from option to value")
    return {str(name).replace("-", "_"): value for name, value in found.items()}


def _go_on(given: argparse.Namespace, changes: dict[str, Any]) -> Command:
    if given.config is not None or hasattr(given, "recipe"):
        raise InputError("--resume: goes on with the checkpoint's own recipe; leave out --recipe and --config")
    folder = checkpoint.resolve(given.resume)
    start = checkpoint.Start(folder, checkpoint.read_state(folder))
    out = given.out or folder.parent.parent
    if out.resolve() != folder.parent.parent.resolve() and _holds_a_run(out):
        raise InputError(f"--out: {out}: holds checkpoints of another run; give a new folder, or none")
    return Command(tuple(resumed(saved, changes) for saved in start.state["plan"]), out, start, given.device)


def _unused(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3, ... where no run is."""
    number, path = 1, folder
    while _holds_a_run(path):
        number += 1
        path = folder.with_name(f"{folder.name}-{number}")
    return path


def _holds_a_run(folder: Path) -> bool:
    return checkpoint.latest(folder / checkpoint.FOLDER) is not None


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Call `main` with the command line and exit: 0, 2 for an InputError, 128 + signal number after a signal, 75 where
    a process of the run has died. Of all processes, the first to end says why, in one line.
    """
    status, text = 0, ""
    try:
        main(sys.argv[1:])
    except Interrupted as stop:
        status, text = stop.exit_code, str(stop)
    except InputError as error:
        status, text = 2, f"error: {error}"
    except RuntimeError as error:
        if not parallel.is_lost(error):
            raise
        status, text = os.EX_TEMPFAIL, lost_process(error)
    if text:
        report_end(text)
    parallel.stop_processes()
    sys.exit(status)
