"""Checkpoints that are either whole or not there: written aside, flushed to disk, renamed; `latest` moves last.

A crash at any moment leaves the previous checkpoint and its `latest` pointer as they were, and one run at a time
writes in a folder.
Layout: <root>/step-00000100/{trainer.json, model/, engine/} and <root>/latest holding "step-00000100".
model/ is what gives the weights' numbers their meaning: config, tokenizer and image processor. A resumed run takes them
from there, and refuses data that is not what the checkpoint was trained on.
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from training import parallel
from training.errors import InputError

FOLDER = "checkpoints"
LATEST = "latest"
TRAINER = "trainer.json"
MODEL = "model"
LOCK = ".lock"
WRITING = ".writing-"
PACKAGES = ("torch", "transformers", "deepspeed", "sail-ops")
KEYS = {"stage", "step", "total", "plan", "feed", "bad", "not_finite", "peak", "recent", "adalrs"}
KEYS |= {"world", "data", "versions"}


class Start(NamedTuple):
    """A checkpoint to go on from, and the trainer's state in it, as `read_state` gave it."""

    folder: Path
    state: dict[str, Any]


def step_name(step: int) -> str:
    """Folder name of the checkpoint taken after `step` steps."""
    return f"step-{step:08d}"


def latest(root: Path) -> Path | None:
    """The newest complete checkpoint under `root`, or None.

    Raises InputError where `latest` names a checkpoint that is not there.
    """
    pointer = root / LATEST
    if not pointer.is_file():  # the very first one may be whole already: it is renamed before the pointer is written
        whole = sorted(path.parent for path in root.glob(f"step-*/{TRAINER}"))
        return whole[-1] if whole else None
    checkpoint = root / pointer.read_text(encoding="utf-8").strip()
    if not (checkpoint / TRAINER).is_file():
        raise InputError(f"{pointer}: names {checkpoint.name}, which is no complete checkpoint")
    return checkpoint


def resolve(path: Path) -> Path:
    """The checkpoint that `path` means: a checkpoint, a folder of checkpoints, or the folder of a run.

    Raises InputError saying what was looked for.
    """
    if (path / TRAINER).is_file():
        return path
    for root in (path, path / FOLDER):
        if (found := latest(root)) is not None:
            return found
    raise InputError(f"--resume: {path}: no {TRAINER} and no {LATEST} in it or in its {FOLDER}/ folder")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's state as `publish` wrote it. Raises InputError where it cannot be read."""
    with reading(checkpoint):
        state: dict[str, Any] = json.loads((checkpoint / TRAINER).read_text(encoding="utf-8"))
        if missing := KEYS - state.keys():
            raise ValueError(f"{TRAINER} has no {', '.join(sorted(missing))}")
    return state


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """What cannot be read inside raises InputError: a file of the checkpoint is missing or damaged."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if parallel.is_lost(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"--resume: {checkpoint}: damaged, or written by another version ({reason}); go on from another one of"
            f" {checkpoint.parent}"
        ) from error


@contextmanager
def only_run_in(out: Path) -> Iterator[None]:
    """Until the block ends, or this process does, no other run writes in `out`. Raises InputError where one does."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"--out: {out}: another run writes in it; wait for its end, or stop it") from error
        yield


def check_data(start: Start, source: str, found: Any) -> None:
    """Raises InputError where the data is not what the checkpoint was trained on (`Mixture.fingerprint`)."""
    trained = start.state["data"]
    if trained != found:
        was, now = ("; ".join(map(_described, data)) for data in (trained, found))
        raise InputError(
            f"--resume: {start.folder}: trained on {was}, but {source} has {now}; a run goes on with its own data:"
            f" bring that back, or start a new run"
        )


def _described(data: dict[str, Any]) -> str:
    return f"{data['records']} records, sha256 {data['sha256'][:12]}, weight {data['weight']:.3g}"


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide a run's numbers."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


class NotSaved(InputError):
    """A checkpoint could not be written, on every rank alike; the one before it is still the latest."""


def is_of_disk(error: Exception) -> bool:
    """Whether a disk is full or fails. Libraries written in Rust say so in words: safetensors, tokenizers."""
    return isinstance(error, OSError) or "(os error " in str(error)


def publish(root: Path, step: int, state: dict[str, Any], write: Callable[[Path], None], *, keep: int = 2) -> Path:
    """Write one checkpoint from all ranks and make it `latest`; older ones than the last `keep` are removed.

    `write(folder)` is called on every rank and writes that rank's files; the first rank does the rest. A checkpoint is
    never overwritten: a second one of the same step gets the suffix ".2". Raises NotSaved where any rank's disk fails.
    """
    final = _unused(root, step_name(step))

    def complete(folder: Path) -> None:
        (folder / TRAINER).write_text(json.dumps(state), encoding="utf-8")
        replace_folder(folder, final)
        replace_file(root / LATEST, final.name + "\n")
        _remove_old(root, keep)

    write_from_ranks(root / f"{WRITING}{step_name(step)}", write, complete)
    return final


def replace_from_ranks(final: Path, write: Callable[[Path], None]) -> None:
    """`final`, made anew by all ranks: what it held before stays until all is written. Raises NotSaved."""
    write_from_ranks(final.with_name(f"{WRITING}{final.name}"), write, lambda folder: replace_folder(folder, final))


def write_from_ranks(folder: Path, write: Callable[[Path], None], complete: Callable[[Path], None]) -> None:
    """`write(folder)` on every rank, then `complete(folder)` on the first. Raises NotSaved on all where one fails."""
    steps: list[tuple[Callable[[Path], None], bool]] = [(_fresh, True), (write, False), (complete, True)]
    for act, first_only in steps:
        failed = ""
        try:
            if parallel.is_first() or not first_only:
                act(folder)
        except Exception as error:
            if not is_of_disk(error):
                raise
            failed = f"process {parallel.rank()}: {error}"
        if found := [reason for reason in parallel.gather_objects(failed) if reason]:
            if parallel.is_first():
                shutil.rmtree(folder, ignore_errors=True)
            final = folder.with_name(folder.name.removeprefix(WRITING))
            raise NotSaved(f"{final}: could not be written: {'; '.join(found)}")


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def replace_folder(written: Path, final: Path) -> None:
    """Flush `written` to disk and give it the name `final`; a folder of that name is moved aside first."""
    for path in sorted(written.rglob("*")):
        flush(path)
    flush(written)
    aside = final.with_name(f".old-{final.name}")
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        final.rename(aside)
    written.rename(final)
    flush(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _unused(root: Path, name: str) -> Path:
    number, path = 1, root / name
    while path.exists():
        number += 1
        path = root / f"{name}.{number}"
    return path


def flush(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, text: str) -> None:
    """Make `text` what `path` holds; a crash leaves what it held before."""
    aside = path.with_name(f".{path.name}")
    aside.write_text(text, encoding="utf-8")
    flush(aside)
    aside.replace(path)
    flush(path.parent)


def _remove_old(root: Path, keep: int) -> None:
    steps = sorted(path for path in root.glob("step-*") if path.is_dir())
    newest = latest(root)
    for path in steps[:-keep] if keep else []:
        if path != newest:
            path.rename(root / f".old-{path.name}")  # half removed, it must not look like a checkpoint
    for leftover in [*root.glob(f"{WRITING}*"), *root.glob(".old-*")]:
        shutil.rmtree(leftover, ignore_errors=True)  # the next checkpoint tries again
