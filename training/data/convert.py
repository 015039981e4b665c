"""`python -m training.data.convert SOURCE OUT`: Parquet or a Hugging Face `datasets` folder to WebDataset shards.

Shards are read at random access, tables are not. OUT gets 00000.tar, 00001.tar, ...; shards.json, which says how long
each is; and skipped.txt, which names the rows that cannot be used. Written aside and checked, OUT is whole or absent.
"""

import io
import json
import shutil
import sys
import tarfile
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from PIL import Image

from training.checkpoint import replace_folder
from training.data.conversation import BadRecord
from training.data.formats import conversation_of
from training.data.sources import LIST, PICTURE_ENDINGS, open_source
from training.data.tables import record_of, rows, table_files
from training.errors import InputError

SHARD_BYTES = 1 << 30
SKIPPED = "skipped.txt"
Members = dict[str, bytes]  # by ending: json, 0.jpg, 1.png


class Counts(NamedTuple):
    """What a conversion has done."""

    records: int
    shards: int
    skipped: int


def convert(source: Path, out: Path, *, split: str | None = None, shard_bytes: int = SHARD_BYTES) -> Counts:
    """Shards of at most `shard_bytes` (or one record) in `out`, equal byte for byte for equal tables.

    A row that cannot be used is skipped and named; a conversion that was stopped starts anew. Raises InputError for an
    `out` that exists, a damaged table, and where no row can be used.
    """
    if out.exists():
        raise InputError(f"{out}: exists already; give the shards a new folder")
    files = table_files(source, split)
    aside = out.with_name(f".writing-{out.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with (aside / SKIPPED).open("w", encoding="utf-8") as said:
        sizes, records = write_shards(aside, _usable(files, said), shard_bytes)
    skipped = sum(1 for _ in _lines(aside / SKIPPED))
    if not records:
        raise InputError(f"{source}: none of its {skipped} rows can be used; {aside / SKIPPED} says why")
    (aside / LIST).write_text(json.dumps(sizes, indent=0), encoding="utf-8")
    _check(aside, records)
    replace_folder(aside, out)
    return Counts(records, len(sizes), skipped)


def _usable(files: Sequence[Path], said: TextIO) -> Iterator[Members]:
    """The rows that training can use, as files of a record; of the others, a line each to `said`."""
    for path in files:
        for number, row in enumerate(rows(path), start=1):
            where = f"{path}: row {number}"
            try:
                yield members_of(row, path.parent, where)
            except ValueError as error:
                said.write(" ".join(f"{where}: {error}".split()) + "\n")


def members_of(row: dict[str, Any], folder: Path, where: str) -> Members:
    """A row as the files of a WebDataset record. Raises ValueError where training could not use it."""
    record, pictures = record_of(row, folder)
    conversation_of(record, None, where, pictures)
    text = json.dumps(record, ensure_ascii=False).encode()
    return {"json": text, **{f"{n}{_ending(data)}": data for n, data in enumerate(pictures)}}


def _ending(data: bytes) -> str:
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind = (image.format or "nothing known").lower()
    except Exception as error:  # of a malformed file Pillow raises nearly anything
        if isinstance(error, MemoryError):
            raise
        raise ValueError(f"a picture of {len(data)} bytes cannot be read: {type(error).__name__}") from error
    ending = ".jpg" if kind == "mpo" else f".{kind}"  # a phone's JPEG with a second picture in it
    if ending not in PICTURE_ENDINGS:
        raise ValueError(f"a picture is {kind}, want one of {', '.join(sorted(PICTURE_ENDINGS))}")
    return ending


def write_shards(folder: Path, records: Iterator[Members], limit: int) -> tuple[dict[str, int], int]:
    """Tars of at most `limit` bytes, or of one record; their sizes by name, and the number of records."""
    sizes: dict[str, int] = {}
    count, members = 0, next(records, None)
    while members is not None:
        path = folder / f"{len(sizes):05}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            while members is not None and (not tar.offset or tar.offset + _size(members) <= limit):
                for ending, data in members.items():
                    entry = tarfile.TarInfo(f"{count:09}.{ending}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
                count, members = count + 1, next(records, None)
        sizes[path.name] = path.stat().st_size
    return sizes, count


def _size(members: Members) -> int:
    """At most so many bytes of a tar: a header, and content in whole blocks."""
    return sum(2 * tarfile.BLOCKSIZE + len(data) for data in members.values())


def _check(folder: Path, records: int) -> None:
    """What was written is what training will read: its number of records, the first and the last of them.

    Raises InputError.
    """
    source = open_source(folder)
    if len(source) != records:
        raise InputError(f"{folder}: wrote {records} records, {len(source)} can be read; look at the disk")
    for number in (0, records - 1):
        try:
            source.conversation(number)
        except BadRecord as error:
            raise InputError(f"{folder}: what was written cannot be read ({error}); look at the disk") from error


def main(arguments: Sequence[str]) -> None:
    """Convert, and say what was skipped."""
    parser = ArgumentParser(prog="python -m training.data.convert", description=__doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a .parquet or .arrow file, or a folder of them")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist")
    parser.add_argument("--split", help="of a folder that holds several: train, test, ...")
    given = parser.parse_args(arguments)
    try:
        found = convert(given.source, given.out, split=given.split)
    except OSError as error:  # a full disk
        raise InputError(f"{given.source}: could not be converted: {error}") from error
    print(f"wrote {given.out}: {found.records:,} records in {found.shards} shards")
    if found.skipped:
        print(f"warning: skipped {found.skipped:,} rows; {given.out / SKIPPED} names them", file=sys.stderr)
        for line in islice(_lines(given.out / SKIPPED), 5):
            print(f"  {line}", file=sys.stderr)


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield line.rstrip("\n")


if __name__ == "__main__":
    from training import cli

    cli.run(main)
