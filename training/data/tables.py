"""Rows of Parquet files and of Hugging Face `datasets` folders (Arrow), as records that `training.data.formats` reads.

Known columns: messages or conversations (lists of structs), texts (a list of {"user", "assistant"}), or question and
answer; with image or images, each bytes, a struct of bytes and path, or a list of these.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.errors import InputError

Row = dict[str, Any]
PICTURES = ("image", "images")
DIALOGUES = ("messages", "conversations", "texts", "question", "answer")
SPLITS = {"train", "training", "validation", "valid", "val", "dev", "test", "eval"}
ENDINGS = (".parquet", ".arrow")
ROWS = 64  # at a time: with their pictures they are in memory


def table_files(source: Path, split: str | None) -> list[Path]:
    """The tables of a file or folder, those of one split. Raises InputError where there is none, or a choice to make.

    A folder that `datasets` has saved names its own files; others in it are caches.
    """
    if source.is_file() and source.suffix in ENDINGS:
        return [source]
    if not source.is_dir():
        raise InputError(f"{source}: want a .parquet or .arrow file, or a folder of them")
    found = sorted(path for path in source.rglob("*") if path.suffix in ENDINGS and _is_data(path))
    splits = {path: _split_of(path.relative_to(source)) for path in found}
    names = ", ".join(sorted({name or "others" for name in splits.values()}))
    if split is not None:
        found = [path for path in found if splits[path] == split]
    elif len(set(splits.values())) > 1:
        raise InputError(f"{source}: holds the splits {names}; want one of them, by --split")
    if not found:
        raise InputError(f"{source}: no .parquet and no .arrow in it" + (f" of split {split!r}" if split else ""))
    return found


def _is_data(path: Path) -> bool:
    listed = path.parent / "state.json"
    if path.suffix == ".arrow" and listed.is_file():
        files = json.loads(listed.read_text(encoding="utf-8")).get("_data_files", [])
        return path.name in {entry["filename"] for entry in files}
    return not path.name.startswith((".", "cache-"))


def _split_of(path: Path) -> str | None:
    """The split that a path names: train-00000-of-00002.parquet, test/data-00000-of-00001.arrow."""
    return next((word for word in re.split(r"[^a-z]+", str(path).lower()) if word in SPLITS), None)


def rows(path: Path) -> Iterator[Row]:
    """The rows, their known columns alone. Raises InputError for a damaged file and one without known columns."""
    pyarrow = _pyarrow()
    try:
        for batch in _batches(path):
            for start in range(0, batch.num_rows, ROWS):
                yield from batch.slice(start, ROWS).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: is cut or damaged ({error}); bring it back, or leave it out") from error


def _batches(path: Path) -> Iterator[Any]:
    pyarrow = _pyarrow()
    if path.suffix == ".parquet":
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from file.iter_batches(ROWS, columns=_columns(path, file.schema_arrow.names))
        return
    with pyarrow.memory_map(str(path)) as mapped:
        try:
            file = pyarrow.ipc.open_stream(mapped)  # as `datasets` writes
        except pyarrow.ArrowInvalid:
            file = pyarrow.ipc.open_file(mapped)
            batches = (file.get_batch(number) for number in range(file.num_record_batches))
        else:
            batches = iter(file)
        columns = _columns(path, file.schema.names)
        for batch in batches:
            yield batch.select(columns)


def _columns(path: Path, names: list[str]) -> list[str]:
    found = [name for name in names if name in (*PICTURES, *DIALOGUES)]
    if not {"messages", "conversations", "texts"} & set(found) and not {"question", "answer"} <= set(found):
        raise InputError(
            f"{path}: columns are {', '.join(names)}; want messages, conversations, texts, or question and answer"
        )
    return found


def record_of(row: Row, folder: Path) -> tuple[Row, list[bytes]]:
    """The row's record and the bytes of its pictures. Raises ValueError with what is wrong."""
    pictures = [_bytes_of(entry, folder) for name in PICTURES for entry in _listed(row.get(name))]
    for name in ("messages", "conversations"):
        if row.get(name) is not None:
            return {name: _without_nulls(row[name])}, pictures
    if row.get("texts") is not None:
        pairs = [(pair.get("user"), pair.get("assistant")) for pair in row["texts"]]
    else:
        pairs = [(row.get("question"), row.get("answer"))]
    if not pairs or not all(isinstance(text, str) and text for pair in pairs for text in pair):
        raise ValueError("a question or an answer is no text")
    shown = [{"type": "image"} for _ in pictures]
    turns: list[Row] = []
    for number, (question, answer) in enumerate(pairs):
        text = {"type": "text", "text": question}
        turns += [{"role": "user", "content": [*([] if number else shown), text]}]
        turns += [{"role": "assistant", "content": answer}]
    return {"messages": turns}, pictures


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _bytes_of(entry: Any, folder: Path) -> bytes:
    """Of bytes, or of a struct of bytes or of a path that starts at the table's folder."""
    if isinstance(entry, dict):
        entry = entry.get("bytes") or entry.get("path")
    if isinstance(entry, bytes):
        return entry
    if not isinstance(entry, str) or not entry:
        raise ValueError("a picture has neither bytes nor a path")
    try:
        return (folder / entry).read_bytes()
    except OSError as error:
        raise ValueError(f"a picture has a path alone, and there is no such file: {error}") from error


def _without_nulls(value: Any) -> Any:
    """Arrow gives every struct all fields that any of them has, as null."""
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("Parquet and Arrow need the package pyarrow: pip install 'sail-ops[parquet]'") from error
    return pyarrow
