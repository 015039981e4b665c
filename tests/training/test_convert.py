"""Parquet and Arrow become shards that hold every usable row, whole or not at all, the same bytes each time."""

import errno
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from training.data import convert
from training.data.conversation import Picture, Text
from training.data.sources import open_source
from training.data.tables import rows
from training.errors import InputError

TURNS = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "this"}]


def picture(color: str, form: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(out, form, **options)
    return out.getvalue()


RED, BLUE = picture("red"), picture("blue", "JPEG")


def as_parquet(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(records), path)
    return path


def as_arrow(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(records)
    with pa.ipc.new_stream(path, table.schema) as stream:
        stream.write_table(table)
    return path


def parts(source: Any, number: int) -> list[Any]:
    return [
        part.source if isinstance(part, Picture) else part.text for part in source.conversation(number).turns[0].parts
    ]


FORMS: dict[str, dict[str, Any]] = {
    "struct": {"image": {"bytes": RED, "path": "a.png"}, "conversations": TURNS},
    "binary": {"image": RED, "conversations": TURNS},
    "list": {"images": [{"bytes": RED, "path": None}], "conversations": TURNS},
    "path": {"image": {"bytes": None, "path": "red.png"}, "conversations": TURNS},
    "messages": {
        "images": [RED],
        "messages": [
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "this"}]},
        ],
    },
    "texts": {"images": [RED], "texts": [{"user": "what?", "assistant": "this", "source": "vqa"}]},
    "question": {"image": RED, "question": "what?", "answer": "this", "id": 3},
}


@pytest.mark.parametrize("write", [as_parquet, as_arrow])
@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, write: Any, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(RED)
    path = write(tmp_path / f"a.{write.__name__[3:]}", [FORMS[form]])
    assert convert.convert(path, tmp_path / "out") == (1, 1, 0)
    source = open_source(tmp_path / "out")
    assert parts(source, 0) == [RED, "what?"]
    assert source.conversation(0).turns[1].parts == (Text("this"),) and source.conversation(0).turns[1].learn


def test_several_pictures_text_alone_and_turns(tmp_path: Path) -> None:
    two = [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "both"}]
    records = [
        {"images": [RED, BLUE], "conversations": two},
        {"images": [], "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}] * 2},
        {"images": None, "conversations": [{"from": "gpt", "value": "once"}]},
        {"images": [picture("red", "MPO", save_all=True)], "conversations": TURNS},
    ]
    convert.convert(as_parquet(tmp_path / "a.parquet", records), tmp_path / "out")
    source = open_source(tmp_path / "out")
    assert parts(source, 0) == [RED, " or ", BLUE, "?"] and len(source.conversation(1).turns) == 4
    assert parts(source, 2) == ["once"] and len(source) == 4


def test_rows_go_through_in_order_over_files_batches_and_shards(tmp_path: Path) -> None:
    def records(first: int, count: int) -> list[dict[str, Any]]:
        return [{"question": f"q{n}", "answer": "a"} for n in range(first, first + count)]

    as_parquet(tmp_path / "in" / "train-00000-of-00002.parquet", records(0, 150))
    as_parquet(tmp_path / "in" / "train-00001-of-00002.parquet", records(150, 1))
    counts = [convert.convert(tmp_path / "in", tmp_path / name, shard_bytes=20_000) for name in ("one", "two")]
    assert counts[0] == counts[1] and counts[0].records == 151 and counts[0].shards > 3
    source = open_source(tmp_path / "one")
    assert [parts(source, n) for n in range(151)] == [[f"q{n}"] for n in range(151)]
    shards = sorted(path.name for path in (tmp_path / "one").glob("*.tar"))
    sizes = json.loads((tmp_path / "one" / "shards.json").read_text())
    assert list(sizes) == shards and shards[0] == "00000.tar"
    for name, size in sizes.items():
        data = (tmp_path / "one" / name).read_bytes()
        assert len(data) == size and data == (tmp_path / "two" / name).read_bytes()


def test_rows_that_cannot_be_used_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"image": {"bytes": RED, "path": None}, "conversations": TURNS}
    bad: list[tuple[dict[str, Any], str]] = [
        ({"image": {"bytes": b"no picture", "path": None}}, "a picture of 10 bytes cannot be read"),
        ({"image": {"bytes": None, "path": "gone.png"}}, "no such file"),
        ({"image": {"bytes": None, "path": None}}, "neither bytes nor a path"),
        ({"image": None}, "more <image> than pictures"),
        ({"image": {"bytes": picture("red", "PCX"), "path": None}}, "a picture is pcx"),
        ({"conversations": None}, "a question or an answer is no text"),
    ]
    path = as_parquet(tmp_path / "a.parquet", [good, *({**good, **changes} for changes, _ in bad), good])
    convert.main([str(path), str(tmp_path / "out")])
    lines = (tmp_path / "out" / convert.SKIPPED).read_text().splitlines()
    for number, (text, (_, wrong)) in enumerate(zip(lines, bad, strict=True), start=2):
        assert text.startswith(f"{path}: row {number}: ") and wrong in text
    said = capsys.readouterr()
    assert "2 records in 1 shards" in said.out and "skipped 6 rows" in said.err and lines[0] in said.err
    assert len(open_source(tmp_path / "out")) == 2


def test_a_split_is_chosen_never_mixed(tmp_path: Path) -> None:
    for split, text in (("train", "a"), ("test", "b")):
        as_arrow(tmp_path / "in" / split / "data-00000-of-00001.arrow", [{"question": text, "answer": "a"}])
        as_arrow(tmp_path / "in" / split / "cache-12.arrow", [{"question": "cached", "answer": "a"}])
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        (tmp_path / "in" / split / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="holds the splits test, train; want one"):
        convert.convert(tmp_path / "in", tmp_path / "out")
    convert.convert(tmp_path / "in", tmp_path / "out", split="test")
    assert parts(open_source(tmp_path / "out"), 0) == ["b"]
    with pytest.raises(InputError, match="no .parquet and no .arrow in it of split 'dev'"):
        convert.convert(tmp_path / "in", tmp_path / "other", split="dev")
    convert.convert(tmp_path / "in" / "train", tmp_path / "train")
    assert len(open_source(tmp_path / "train")) == 1


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_a_cut_table_leaves_nothing_and_a_second_try_starts_anew(ending: str, tmp_path: Path) -> None:
    write = as_parquet if ending == "parquet" else as_arrow
    records = [{"question": f"q{n}" * 500, "answer": "a"} for n in range(200)]
    write(tmp_path / "in" / f"a.{ending}", records)
    path = write(tmp_path / "in" / f"b.{ending}", records)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=rf"b\.{ending}: is cut or damaged"):
        convert.convert(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    path.write_bytes(whole)
    assert convert.convert(tmp_path / "in", tmp_path / "out").records == 400
    assert len(open_source(tmp_path / "out")) == 400
    with pytest.raises(InputError, match="out: exists already"):
        convert.convert(tmp_path / "in", tmp_path / "out")


def test_a_file_in_arrows_other_form(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{"question": "q", "answer": "a"}])
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as file:
        file.write_table(table)
    assert list(rows(tmp_path / "a.arrow")) == [{"question": "q", "answer": "a"}]


BLOCK = 512  # of a tar; each record of the test has a header and one of content


def blanked(*blocks: int) -> Callable[[Path], None]:
    """Zeros in their place, as a crash leaves them: the size is right, and a header of zeros ends a tar."""

    def damage(shard: Path) -> None:
        data = bytearray(shard.read_bytes())
        for block in blocks:
            data[block * BLOCK : (block + 1) * BLOCK] = bytes(BLOCK)
        shard.write_bytes(data)

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "records lost": (blanked(2, 3, 4, 5), "wrote 3 records, 1 can be read"),
    "first blank": (blanked(1), r"what was written cannot be read \(.*00000.tar: /000000000: "),
    "last blank": (blanked(5), r"what was written cannot be read \(.*00000.tar: /000000002: "),
    "cut": (lambda shard: os.truncate(shard, 700), r"00000.tar: has 700 bytes, shards.json says 10240"),
}


@pytest.mark.parametrize(("damage", "wrong"), DAMAGES.values(), ids=DAMAGES.keys())
def test_what_the_disk_did_not_keep_is_no_conversion(
    damage: Callable[[Path], None], wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = as_parquet(tmp_path / "a.parquet", [{"question": f"q{n}", "answer": "a"} for n in range(3)])
    write = convert.write_shards

    def damaged(folder: Path, *arguments: Any) -> Any:
        found = write(folder, *arguments)
        damage(folder / "00000.tar")
        return found

    with monkeypatch.context() as patched, pytest.raises(InputError, match=wrong):
        patched.setattr(convert, "write_shards", damaged)
        convert.convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert convert.convert(path, tmp_path / "out") == (3, 1, 0)


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = as_parquet(tmp_path / "a.parquet", [{"question": "q", "answer": "a"}])
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(convert, "write_shards", Mock(side_effect=full))
    with pytest.raises(InputError, match=r"a\.parquet: could not be converted: .*No space left on device"):
        convert.main([str(path), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = as_parquet(tmp_path / "a.parquet", [{"text": "a", "label": 3}])
    with pytest.raises(InputError, match="columns are text, label; want messages"):
        convert.convert(path, tmp_path / "out")
    with pytest.raises(InputError, match="want a .parquet or .arrow file"):
        convert.convert(tmp_path / "none", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no .parquet and no .arrow in it"):
        convert.convert(tmp_path / "empty", tmp_path / "out")
    bad = as_parquet(tmp_path / "b.parquet", [{"question": "", "answer": "a"}])
    with pytest.raises(InputError, match="none of its 1 rows can be used"):
        convert.convert(bad, tmp_path / "out")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"need the package pyarrow: pip install 'sail-ops\[parquet\]'"):
        convert.convert(bad, tmp_path / "out")
