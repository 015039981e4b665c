"""The command line shared by `python -m training` and `python -m training.demo`."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from training import checkpoint
from training.device import stop_processes
from training.errors import InputError
from training.interrupt import Interrupted
from training.recipes import Recipe, resumed


def parser(program: str, description: str, out: str) -> argparse.ArgumentParser:
    """--out, --resume, and one option for each field of `Recipe`."""
    made = argparse.ArgumentParser(
        prog=f"python -m {program}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.set_defaults(default_out=Path(out))
    made.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"folder of the run (default: the next free of {out}, {out}-2, ..., or the resumed run)",
    )
    made.add_argument(
        "--resume", type=Path, metavar="DIR", help="go on from this checkpoint, or the latest of this run"
    )
    recipe = made.add_argument_group("recipe")
    types = get_type_hints(Recipe)
    for entry in fields(Recipe):
        assert entry.default is not MISSING
        recipe.add_argument(
            "--" + entry.name.replace("_", "-"),
            default=argparse.SUPPRESS,
            help=f"{entry.metadata['help']} (default: {entry.default})",
            **_how_to_read(types[entry.name]),
        )
    return made


def _how_to_read(kind: Any) -> dict[str, Any]:
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if choices := get_args(kind):
        return {"type": type(choices[0]), "choices": choices}
    return {"type": kind, "metavar": kind.__name__.upper()}


def read(made: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[Recipe, Path, Path | None]:
    """(recipe, folder of the run, checkpoint to go on from). Raises InputError for what makes no sense together."""
    given = made.parse_args(arguments)
    changes = {entry.name: getattr(given, entry.name) for entry in fields(Recipe) if hasattr(given, entry.name)}
    if given.resume is not None:
        start = checkpoint.resolve(given.resume)
        state = checkpoint.read_state(start)
        checkpoint.check_world(start, state, int(os.environ.get("WORLD_SIZE", "1")))
        out = given.out or start.parent.parent
        if out.resolve() != start.parent.parent.resolve() and _holds_a_run(out):
            raise InputError(f"--out: {out}: holds checkpoints of another run; give a new folder, or none")
        return resumed(state["recipe"], changes), out, start
    out = given.out or _unused(given.default_out)
    if _holds_a_run(out):
        raise InputError(f"--out: {out}: holds checkpoints; give --resume {out} or another --out")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: {out}: is a file, want a folder")
    return Recipe(**changes), out, None


def _unused(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3, ... where no run is."""
    number, path = 1, folder
    while _holds_a_run(path):
        number += 1
        path = folder.with_name(f"{folder.name}-{number}")
    return path


def _holds_a_run(folder: Path) -> bool:
    return (folder / checkpoint.FOLDER).exists()


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Call `main` with the command line and exit: 0, 2 for an InputError, 128 + signal number after a signal."""
    status = 0
    try:
        main(sys.argv[1:])
    except (Interrupted, InputError) as stop:
        status = stop.exit_code if isinstance(stop, Interrupted) else 2
        if os.environ.get("RANK", "0") == "0":
            print(stop if isinstance(stop, Interrupted) else f"error: {stop}", file=sys.stderr)
    stop_processes()
    sys.exit(status)
