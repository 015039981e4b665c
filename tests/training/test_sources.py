"""Records at random access: lines, shards and folders, indexed once, with what is damaged named and never fatal."""

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import pytest

from training.data.conversation import BadRecord, Picture, Text, Turn
from training.data.index import Index
from training.data.sources import open_source
from training.errors import InputError


def line(text: str) -> str:
    return json.dumps({"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "a"}]})


def words(source: object, number: int) -> str:
    (part,) = source.conversation(number).turns[0].parts  # type: ignore[attr-defined]
    assert isinstance(part, Text)
    return part.text


def write_shard(path: Path, records: list[tuple[str, dict[str, bytes]]], form: int = tarfile.USTAR_FORMAT) -> None:
    with tarfile.open(path, "w", format=form) as tar:
        for key, members in records:
            for ending, data in members.items():
                entry = tarfile.TarInfo(f"{key}.{ending}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


def shown(pictures: int) -> bytes:
    value = "<image>" * pictures + "q"
    return json.dumps({"conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "a"}]}).encode()


def test_lines_in_any_order_and_what_is_wrong_with_one(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(f"{line('zero')}\n{line('one')}\n{{\n{line('three ')}".encode() + b"\n\xff\n")
    source = open_source(path)
    assert len(source) == 5
    assert [words(source, n) for n in (3, 0, 1)] == ["three ", "zero", "one"]
    for number, wrong in ((2, "line 3: Expecting"), (4, "line 5: 'utf-8'")):
        with pytest.raises(BadRecord, match=f"data.jsonl: {wrong}"):
            source.conversation(number)
    assert words(pickle.loads(pickle.dumps(source)), 1) == "one"


def test_what_editors_and_shells_leave_in_lines(tmp_path: Path) -> None:
    path = tmp_path / "DATA.JSONL"
    path.write_bytes(b"\xef\xbb\xbf\r\n" + f"{line('one')}\r\n\n  \t\r\n{line('two')}\n{{\n\n\n".encode())
    source = open_source(path)
    assert len(source) == 3 and [words(source, n) for n in (0, 1)] == ["one", "two"]
    with pytest.raises(BadRecord, match="DATA.JSONL: line 6: Expecting"):
        source.conversation(2)
    path.write_bytes(b" \n\n")
    with pytest.raises(InputError, match="no records"):
        open_source(path)


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_a_list_in_a_json_file(bom: bytes, tmp_path: Path) -> None:
    path = tmp_path / "llava.json"
    texts = ["zero \u00e9,", "[one]", "two\u2028"]
    records = [json.loads(line(text)) for text in texts]
    for indent in (None, 2):
        path.write_bytes(bom + json.dumps([*records, 3], indent=indent, ensure_ascii=False).encode() + b"\n")
        source = open_source(path)
        assert len(source) == 4 and [words(source, n) for n in (2, 0, 1)] == [texts[n] for n in (2, 0, 1)]
        with pytest.raises(BadRecord, match=r"llava.json: entry 4: no object"):
            source.conversation(3)


@pytest.mark.parametrize(
    ("data", "wrong"),
    [
        (b"[]", "no records"),
        (b'{"messages": []}', "no JSON list, .*; where it has a record a line"),
        (b"[{}, {}", "cut or damaged at byte 7: want , or"),
        (b'[{"a": ', "cut or damaged at byte 1: Expecting"),
        (b"[1 2]", "cut or damaged at byte 3"),
        (b"[" * 100_000, "cut or damaged at byte 1"),
        ("[]".encode("utf-16"), "is UTF-16; want UTF-8"),
    ],
)
def test_what_is_no_list(data: bytes, wrong: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(InputError, match=wrong):
        open_source(path)


def test_lines_that_no_tokenizer_or_stack_can_take_are_bad_records(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line("x").replace("x", "\\ud800") + "\n" + "[" * 100_000 + "\n" + line("good"))
    source = open_source(path)
    for number, wrong in ((0, "half a character"), (1, "line 2: .*recursion")):
        with pytest.raises(BadRecord, match=wrong):
            source.conversation(number)
    assert words(source, 2) == "good"


def test_hidden_files_are_no_records(tmp_path: Path) -> None:
    # macOS leaves a ._x beside each x, in folders and in tars
    write_shard(tmp_path / "A.TAR", [("._one", {"json": b"x"}), ("one", {"json": shown(0)})])
    (tmp_path / "._A.TAR").write_bytes(b"x")
    source = open_source(tmp_path)
    assert len(source) == 1 and words(source, 0) == "q"


def test_an_index_of_another_form_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(line("one") + "\n")
    monkeypatch.setattr("training.data.index.FORM", 1)
    open_source(path)
    (tmp_path / ".sail-index" / path.name / "blanks.npy").unlink()
    monkeypatch.undo()
    assert words(open_source(path), 0) == "one"


def test_a_line_ends_where_json_lines_end(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(line("one\u2028two\x85") + "\r\n" + line("last"), encoding="utf-8")
    source = open_source(path)
    assert len(source) == 2 and words(source, 0) == "one\u2028two\x85" and words(source, 1) == "last"


def test_a_record_made_to_break_its_reader_is_a_bad_record(tmp_path: Path) -> None:
    deep = b"[" * 100_000
    (tmp_path / "a.jsonl").write_bytes(deep + b"\n" + json.dumps({"\ud800": 1}).encode() + b"\n" + line("q").encode())
    write_shard(tmp_path / "b.tar", [("deep", {"json": deep}), ("last", {"json": shown(0)})])
    source = open_source(tmp_path)
    for number, wrong in (
        (0, "line 1: maximum recursion"),
        (1, r"line 2: got \\ud800"),
        (3, "deep: maximum recursion"),
    ):
        with pytest.raises(BadRecord, match=wrong) as caught:
            source.conversation(number)
        str(pickle.loads(pickle.dumps(caught.value))).encode()  # a log takes no surrogate
    assert [words(source, number) for number in (2, 4)] == ["q", "q"]


def test_there_may_be_more_files_than_a_process_may_hold_open(tmp_path: Path) -> None:
    for number in range(3):
        write_shard(tmp_path / f"{number}.tar", [("one", {"json": shown(0)})])
        (tmp_path / f"{number}.jsonl").write_text(line("q"))
    opened = os.listdir("/proc/self/fd")
    source = open_source(tmp_path)
    assert [words(source, number) for number in range(6)] == ["q"] * 6
    assert os.listdir("/proc/self/fd") == opened


def test_members_that_belong_to_no_record(tmp_path: Path) -> None:
    nameless = [("./.", {"_one.json": b"\0"}), ("./", {"DS_Store": b"\0"}), ("__MACOSX/.", {"_one.jpg": b"\0"})]
    write_shard(tmp_path / "a.tar", [*nameless, ("./one", {"json": shown(0)})])
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("README"))
    source = open_source(tmp_path / "a.tar")
    assert len(source) == 1 and words(source, 0) == "q"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_shards(form: int, tmp_path: Path) -> None:
    many = {"json": shown(11), **{f"{n}.jpg": str(n).encode() for n in range(11)}}
    write_shard(tmp_path / "a-0.tar", [("x/one", {"jpg": b"1", "json": shown(1)}), ("x/two" + "o" * 90, many)], form)
    write_shard(tmp_path / "a-1.tar", [("three", {"json": shown(0)}), ("four", {"png": b"4"})], form)
    source = open_source(tmp_path)
    assert len(source) == 4
    pictures = [part.source for part in source.conversation(1).turns[0].parts if isinstance(part, Picture)]
    assert pictures == [str(n).encode() for n in range(11)]
    assert words(pickle.loads(pickle.dumps(source)), 2) == "q"
    with pytest.raises(BadRecord, match="a-1.tar: /four: has neither .json nor .txt"):
        source.conversation(3)


def test_a_picture_with_its_text_is_a_caption(tmp_path: Path) -> None:
    """As public caption sets are, often with metadata beside: {"url": ...}."""
    about = b'{"caption": "b", "url": "u"}'
    shard = [
        ("one", {"jpg": b"1", "txt": b"\xef\xbb\xbf a red circle,\nalone \n"}),
        ("two", {"txt": "ein großer Kreis".encode(), "png": b"2", "json": about}),
        ("three", {"jpg": b"3", "txt": b"left alone", "json": shown(1)}),
    ]
    write_shard(tmp_path / "a.tar", shard)
    source = open_source(tmp_path / "a.tar")
    for number, picture, caption in ((0, b"1", "a red circle,\nalone"), (1, b"2", "ein großer Kreis")):
        asked, answer = source.conversation(number).turns
        assert asked == Turn("user", (Picture(picture),))
        assert answer == Turn("assistant", (Text(caption),), learn=True)
    # a conversation is itself, whatever lies beside it
    assert source.conversation(2).turns[0].parts == (Picture(b"3"), Text("q"))


@pytest.mark.parametrize(
    ("members", "wrong"),
    [
        ({"jpg": b"1", "txt": b" \n"}, "the caption is empty"),
        ({"jpg": b"1", "txt": b"\xff\xfe"}, "can't decode byte 0xff"),
        ({"jpg": b"1", "txt": b"see <image>"}, "holds <image>"),
        ({"txt": b"a"}, "0 pictures and 1 .txt, want one caption of one picture"),
        ({"0.jpg": b"1", "1.jpg": b"2", "txt": b"a"}, "2 pictures and 1 .txt"),
        ({"jpg": b"1", "short.txt": b"a", "long.txt": b"b"}, "1 pictures and 2 .txt"),
        ({"jpg": b"1", "txt": b"a", "json": b"{"}, "Expecting property name"),
        ({"jpg": b"1", "json": b'{"caption": "a"}'}, "got caption; want"),
    ],
)
def test_what_is_no_caption(members: dict[str, bytes], wrong: str, tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [("one", members)])
    with pytest.raises(BadRecord, match=f"a.tar: /one: .*{wrong}"):
        open_source(tmp_path / "a.tar").conversation(0)


@pytest.mark.parametrize("cut", [700, 1500, 2048, 2500])
def test_a_cut_shard_is_refused_when_it_is_opened(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, [("one", {"json": shown(0)}), ("two", {"json": shown(0)})])
    os.truncate(path, cut)
    with pytest.raises(InputError, match=r"a\.tar: the shard is cut or damaged"):
        open_source(path)


def test_a_shard_that_shrinks_or_goes_afterwards_spoils_its_records_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, [("one", {"json": shown(0)}), ("two", {"json": shown(0)})])
    source, other = open_source(path), open_source(path)
    os.truncate(path, 1100)
    assert words(source, 0) == "q"
    with pytest.raises(BadRecord, match="two: two.json: the shard ends in the middle"):
        source.conversation(1)
    path.unlink()
    with pytest.raises(BadRecord, match="No such file"):
        other.conversation(0)


def test_shards_that_a_list_names_must_be_there(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [("one", {"json": shown(0)})])
    size = (tmp_path / "a.tar").stat().st_size
    (tmp_path / "shards.json").write_text(json.dumps({"a.tar": size, "b.tar": size}))
    with pytest.raises(InputError, match=r"b\.tar: is missing, shards.json says"):
        open_source(tmp_path)
    write_shard(tmp_path / "b.tar", [("one", {"json": shown(0)})])
    assert len(open_source(tmp_path)) == 2
    (tmp_path / "b.tar").write_bytes(b"")
    with pytest.raises(InputError, match=r"b\.tar: has 0 bytes"):
        open_source(tmp_path)
    for damaged in ("[", '["a.tar"]'):
        (tmp_path / "shards.json").write_text(damaged)
        with pytest.raises(InputError, match=r"shards\.json: .*want {name of a shard: its bytes}"):
            open_source(tmp_path)


def test_the_index_follows_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(line("one") + "\n")
    before = open_source(path).fingerprint
    built = []
    original = Index._write

    def counted(*arguments: object) -> bool:
        built.append(1)
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Index, "_write", counted)
    assert open_source(path).fingerprint == before and not built
    path.write_text(line("one") + "\n" + line("two") + "\n")
    assert len(open_source(path)) == 2 and built
    (tmp_path / "moved").mkdir()
    moved = path.rename(tmp_path / "moved" / path.name)
    assert open_source(moved).fingerprint != before
    moved.write_text(line("one") + "\n")
    assert open_source(moved).fingerprint == before, "the place and the time of a file are not what is in it"


def test_an_index_goes_to_the_cache_where_the_data_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(line("one") + "\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / ".sail-index").write_text("in the way")  # also for root, who may write anywhere
    assert len(open_source(path)) == 1 and list((tmp_path / "cache").rglob("edges.npy"))
    (tmp_path / "cache").rename(tmp_path / "gone")
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(InputError, match="its index can be written neither"):
        open_source(path)


def test_a_damaged_index_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(line("one") + "\n")
    open_source(path)
    (table,) = (tmp_path / ".sail-index").rglob("edges.npy")
    table.write_bytes(b"")
    assert words(open_source(path), 0) == "one"


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("none.jsonl", "is no file"),
        ("a.parquet", "want a .jsonl file"),
        ("empty.jsonl", "no records"),
        (".", "no .jsonl"),
    ],
)
def test_what_is_no_source(name: str, wrong: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(InputError, match=wrong):
        open_source(tmp_path / "sub" if name == "." else tmp_path / name)
