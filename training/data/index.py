"""Where each record of a data file begins: arrays made in one pass over it, kept beside it, mapped into memory.

Kept in `.sail-index/` beside the data, or in the user's cache where that cannot be written to, and made anew when the
data's size or time has changed. Several processes may make the same index at once: each is whole or not there.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from training.errors import InputError

FOLDER = ".sail-index"
FORM = 2  # of the arrays; an index of another form is made anew
Arrays = dict[str, NDArray[Any]]
Build = Callable[[Path], tuple[Arrays, str]]  # arrays, and a digest of what the file holds


class Index:
    """The arrays that `build` makes of the file at `path`, by name; `digest` says what the file holds."""

    def __init__(self, path: Path, build: Build) -> None:
        if not path.is_file():
            raise InputError(f"{path}: is no file")
        status = path.stat()
        self._stamp = [FORM, path.name, status.st_size, status.st_mtime_ns]
        places = [path.parent / FOLDER / path.name, _cache(path)]
        if not any(self._read(place) for place in places):
            arrays, digest = build(path)
            if not any(self._write(place, arrays, digest) and self._read(place) for place in places):
                raise InputError(f"{path}: its index can be written neither to {places[0]} nor to {places[1]}")

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._arrays[name]

    def _read(self, place: Path) -> bool:
        try:
            described = json.loads((place / "index.json").read_text(encoding="utf-8"))
            if described["stamp"] != self._stamp:
                return False
            self._place, self.digest, self._names = place, described["digest"], described["arrays"]
            self._map()
        except (OSError, ValueError, KeyError, EOFError):
            return False
        return True

    def _map(self) -> None:
        self._arrays = {name: _mapped(self._place / f"{name}.npy") for name in self._names}

    def _write(self, place: Path, arrays: Arrays, digest: str) -> bool:
        try:
            place.mkdir(parents=True, exist_ok=True)
            for name, values in arrays.items():
                aside = place / f".{name}.{os.getpid()}.npy"
                np.save(aside, values)
                aside.replace(place / f"{name}.npy")
            described = {"stamp": self._stamp, "digest": digest, "arrays": list(arrays)}
            aside = place / f".index.{os.getpid()}.json"
            aside.write_text(json.dumps(described), encoding="utf-8")
            aside.replace(place / "index.json")  # last: it says that the arrays are whole
        except OSError:
            return False
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_arrays"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()


def _mapped(path: Path) -> NDArray[Any]:
    """The array in a .npy file. numpy's mapping keeps the file open; a data set has more shards than a process may."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        begin, size = file.tell(), os.fstat(file.fileno()).st_size
    held = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    found: NDArray[Any] = held[begin:].view(dtype).reshape(shape)
    found.flags.writeable = False
    return found


def _cache(path: Path) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "sail" / "index" / hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24]
