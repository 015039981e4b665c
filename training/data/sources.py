"""Records at random access: JSON lines or lists, WebDataset shards, folders of them; an index says where each begins.

The index is mapped into memory, 8 bytes a line, so that 10^6 records cost a process no more than what it touches.
Nothing but the standard library and numpy is between a record and its bytes.
"""

import hashlib
import json
import os
import tarfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from training.data.conversation import BadRecord, Conversation
from training.data.formats import captioned, conversation_of, is_conversation
from training.data.index import Arrays, Index
from training.data.json_edges import elements, lines
from training.errors import InputError

PICTURE_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm"}
LIST = "shards.json"  # of the converter: each shard and its size
# of a record; RecursionError is deep nesting's
UNUSABLE = (ValueError, OSError, RecursionError)


class Source(Protocol):
    """Numbered records. Picklable; files are open while a record is read."""

    name: str
    fingerprint: dict[str, Any]  # {"records", "sha256"}; moving the files does not change it

    def __len__(self) -> int: ...

    def conversation(self, number: int) -> Conversation:
        """Raises BadRecord."""


def _read(path: Path, *spans: tuple[int, int]) -> list[bytes]:
    """The bytes at each (offset, size); fewer where the file is shorter than its index says.

    Opened each time: a process may hold fewer files open than a data set has shards.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return [os.pread(descriptor, size, start) for start, size in spans]
    finally:
        os.close(descriptor)


class JsonFile:
    """A .jsonl file, a record a line, or a .json with a list of records; relative paths in it start at its folder."""

    def __init__(self, path: Path) -> None:
        self.path, self.name, self._is_list = path, path.name, path.suffix.lower() == ".json"
        self._index = Index(path, elements if self._is_list else lines)
        self.fingerprint = {"records": len(self), "sha256": self._index.digest}

    def __len__(self) -> int:
        return len(self._index["edges"]) - 1

    def conversation(self, number: int) -> Conversation:
        """The conversation of the `number`-th line that is not blank, or of the list's `number`-th entry."""
        start, stop = (int(edge) for edge in self._index["edges"][number : number + 2])
        where = f"{self.path}: {self._place(number)}"
        try:
            (text,) = _read(self.path, (start, stop - start))
            record = json.loads(text.rstrip(b", \t\r\n") if self._is_list else text)
            return conversation_of(record, self.path.parent, where)
        except UNUSABLE as error:
            raise BadRecord(where, str(error)) from error

    def _place(self, number: int) -> str:
        if self._is_list:
            return f"entry {number + 1}"
        return f"line {number + 1 + int(np.searchsorted(self._index['blanks'], number, side='right'))}"


class Shard:
    """A WebDataset tar: members of one key are a record, key.json with key.jpg, or key.0.jpg, key.1.jpg, ...

    key.jpg with key.txt is a captioned picture; then a key.json that is no conversation is metadata.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self._index = Index(path, _members)
        self.fingerprint = {"records": len(self), "sha256": self._index.digest}

    def __len__(self) -> int:
        return len(self._index["firsts"]) - 1

    def conversation(self, number: int) -> Conversation:
        """The conversation of the `number`-th key."""
        first, last = (int(edge) for edge in self._index["firsts"][number : number + 2])
        names = [self._name(member) for member in range(first, last)]
        where = f"{self.path}: {_split_name(names[0])[0]}"
        try:
            return self._conversation(names, self._index["members"][first:last, :2].tolist(), where)
        except UNUSABLE as error:
            raise BadRecord(where, str(error)) from error

    def _name(self, member: int) -> str:
        stop = int(self._index["members"][member, 2])
        start = int(self._index["members"][member - 1, 2]) if member else 0
        return self._index["names"][start:stop].tobytes().decode(errors="replace")

    def _conversation(self, names: list[str], spans: list[tuple[int, int]], where: str) -> Conversation:
        record, pictures, captions = None, [], []
        members = zip(names, spans, _read(self.path, *spans), strict=True)
        for name, (_, size), data in sorted(members, key=lambda member: _natural(member[0])):
            ending = Path(name).suffix.lower()
            if len(data) < size:
                raise ValueError(f"{name}: the shard ends in the middle of it")
            if ending == ".json":
                record = json.loads(data)
            elif ending in PICTURE_ENDINGS:
                pictures.append(data)
            elif ending == ".txt":
                captions.append(data)
        if captions and not is_conversation(record):
            return captioned(pictures, captions, where)
        if record is None:
            raise ValueError("has neither .json nor .txt")
        return conversation_of(record, None, where, pictures)


class Folder:
    """Several sources, one after the other."""

    def __init__(self, path: Path, parts: list[Source]) -> None:
        self.path, self.name, self.parts = path, path.name, parts
        self._ends = np.cumsum([len(part) for part in parts])
        digest = hashlib.sha256("".join(part.fingerprint["sha256"] for part in parts).encode()).hexdigest()
        self.fingerprint = {"records": len(self), "sha256": digest}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def conversation(self, number: int) -> Conversation:
        """Of the part that holds it."""
        part = int(np.searchsorted(self._ends, number, side="right"))
        return self.parts[part].conversation(number - int(self._ends[part]) + len(self.parts[part]))


def open_source(path: Path) -> Source:
    """A .jsonl or .json file, a .tar shard, a folder of .jsonl and .tar. InputError for all else."""
    if path.is_dir():
        files = sorted(
            file for file in path.iterdir() if file.suffix.lower() in (".jsonl", ".tar") and _shown(file.name)
        )
        if not files:
            raise InputError(
                f"{path}: no .jsonl and no .tar in it; Parquet is converted once: python -m training.data.convert"
            )
        _check_complete(path, files)
        source: Source = Folder(path, [open_source(file) for file in files])
    elif path.suffix.lower() in (".jsonl", ".json"):
        source = JsonFile(path)
    elif path.suffix.lower() == ".tar":
        source = Shard(path)
    else:
        raise InputError(
            f"{path}: want a .jsonl file, a .json list, a .tar shard, or a folder of lines or shards;"
            " Parquet and Arrow are converted once: python -m training.data.convert"
        )
    if not len(source):
        raise InputError(f"{path}: no records")
    return source


def _check_complete(folder: Path, files: list[Path]) -> None:
    """Where the converter left a list of shards, all of them must be there, and as long as it says."""
    listed = folder / LIST
    if not listed.is_file():
        return
    try:
        sizes = json.loads(listed.read_text(encoding="utf-8")).items()
    except (ValueError, AttributeError) as error:
        raise InputError(f"{listed}: {error}; want {{name of a shard: its bytes}}, as the converter wrote") from error
    for name, size in sizes:
        found = (folder / name).stat().st_size if folder / name in files else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise InputError(
                f"{folder / name}: {state}, {listed.name} says {size} bytes; bring it back or convert anew"
            )


def _members(path: Path) -> tuple[Arrays, str]:
    """The files in a tar (offset, size, end of their names in `names`) and the first of each record; SHA-256 of these.

    Raises InputError where the tar is cut or damaged: what comes behind would be lost without a word.
    """
    rows: list[tuple[int, int, int]] = []
    names, firsts, key = bytearray(), [], None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile() or not _shown(Path(member.name).name):
                    continue
                found, ending = _split_name(member.name)
                if not ending:
                    continue  # of no record, as WebDataset has it: README
                if found != key:
                    firsts.append(len(rows))
                names += member.name.encode()
                rows.append((member.offset_data, member.size, len(names)))
                key = found
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps all headers that it has seen
            # tarfile takes a broken header for the end, which is a block of zeros
            if _read(path, (tar.offset, tarfile.BLOCKSIZE)) != [bytes(tarfile.BLOCKSIZE)]:
                raise tarfile.ReadError(f"no end after byte {tar.offset}")
    except tarfile.TarError as error:
        raise InputError(f"{path}: the shard is cut or damaged ({error}); bring it back, or leave it out") from error
    members = np.array(rows, np.int64).reshape(-1, 3)
    arrays: Arrays = {
        "members": members,
        "names": np.frombuffer(bytes(names), np.uint8),
        "firsts": np.array([*firsts, len(rows)], np.int64),
    }
    return arrays, hashlib.sha256(bytes(names) + members[:, 1].tobytes()).hexdigest()


def _shown(name: str) -> bool:
    """Not hidden: macOS leaves a ._x beside each x."""
    return not name.startswith(".")


def _split_name(name: str) -> tuple[str, str]:
    """Key and ending: a key ends at the first dot of the file's name, as WebDataset has it."""
    folder, _, file = name.rpartition("/")
    key, _, ending = file.partition(".")
    return f"{folder}/{key}", ending


def _natural(name: str) -> list[Any]:
    """Sorts key.2.jpg before key.10.jpg."""
    return [(0, int(piece)) if piece.isdigit() else (1, piece) for piece in _split_name(name)[1].split(".")]
