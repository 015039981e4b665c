"""Where the records of a JSON file begin: 8 bytes a record, found in one pass.

A record reaches to the beginning of the next: white space and a list's comma behind it are its reader's to strip.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.data.index import Arrays
from training.errors import InputError

WHITE = b" \t\r\n\xef\xbb\xbf"  # of JSON, and the byte order mark
SPACE = re.compile(r"[ \t\r\n]*")
BLANK = 16  # bytes: a line of at most so many may be blank, as no record is so short


def lines(path: Path) -> tuple[Arrays, str]:
    """`edges`, the beginnings of lines and the end of the last; `blanks`, the record that follows each blank line;
    SHA-256 of the file. Blank lines belong to the record before them."""
    edges, position, digest = [np.zeros(1, np.int64)], 0, hashlib.sha256()
    with path.open("rb") as file:
        _check_utf8(path, file.read(2))
        file.seek(0)
        while block := file.read(1 << 24):
            digest.update(block)
            edges.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + position + 1)
            position += len(block)
        found = np.concatenate(edges)
        found = found if found[-1] == position else np.append(found, position)
        blank = _blank(file.fileno(), found)
    kept = np.flatnonzero(~blank)
    # of the blank lines, how many records are before them
    before = np.cumsum(~blank)[blank]
    return {"edges": np.append(found[kept], position), "blanks": before}, digest.hexdigest()


def _blank(descriptor: int, edges: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Of each line, whether it is white space alone."""
    blank = np.zeros(len(edges) - 1, np.bool_)
    for number in np.flatnonzero(np.diff(edges) <= BLANK):
        start, stop = int(edges[number]), int(edges[number + 1])
        blank[number] = not os.pread(descriptor, stop - start, start).strip(WHITE)
    return blank


def elements(path: Path) -> tuple[Arrays, str]:
    """`edges` of the entries of a list, and the end of the last; SHA-256 of the file. Raises InputError for no list.

    The file is in memory while its index is made, once.
    """
    data = path.read_bytes()
    _check_utf8(path, data[:2])
    # a character a byte, so that places are offsets: what has a meaning in JSON is ASCII
    edges = list(_spans(path, data.decode("latin-1")))
    return {"edges": np.array(edges, np.int64)}, hashlib.sha256(data).hexdigest()


def _spans(path: Path, text: str) -> Iterator[int]:
    decoder = json.JSONDecoder()
    position = _skip(text, 3 if text.startswith("\xef\xbb\xbf") else 0)  # a byte order mark
    if text[position : position + 1] != "[":
        raise InputError(
            f"{path}: holds no JSON list, nor a mixture's sources; where it has a record a line, name it .jsonl"
        )
    position = _skip(text, position + 1)
    yield position
    while text[position : position + 1] != "]":
        try:
            _, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: the list is cut or damaged at byte {position}: {error}") from error
        position = _skip(text, position)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
        elif text[position : position + 1] != "]":
            raise InputError(f"{path}: the list is cut or damaged at byte {position}: want , or ]")
        yield position


def _skip(text: str, position: int) -> int:
    found = SPACE.match(text, position)
    assert found is not None
    return found.end()


def _check_utf8(path: Path, head: bytes) -> None:
    if head in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{path}: is UTF-16; want UTF-8 (PowerShell: Out-File -Encoding utf8)")
