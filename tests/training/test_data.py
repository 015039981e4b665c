"""Records, pictures that cannot be read, and a feed that resumes at the very next stream."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from training.packing import IGNORE, Branch, Sample, pack
from training.records import PictureReader, StreamFeed, easy_vqa, jsonl_records

from training.errors import InputError
from training.evaluate import majority_baseline, question_only_baseline


def tiny_pixels(picture: Image.Image) -> Tensor:
    return torch.tensor(list(picture.resize((2, 2)).tobytes())).float().view(2, 2, 3).permute(2, 0, 1) / 255


def sample(picture: Path, length: int = 4) -> Sample[Path]:
    return Sample(picture, (1,), (Branch(tuple(range(length - 1)), (IGNORE, *range(1, length - 1))),))


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Good, cut in the middle, empty, missing."""
    paths = [tmp_path / name for name in ("good.png", "cut.png", "empty.png", "missing.png")]
    noise = torch.randint(0, 255, (64, 64, 3), generator=torch.Generator().manual_seed(0)).byte()
    for path in paths[:2]:
        Image.fromarray(noise.numpy()).save(path)
    paths[1].write_bytes(paths[1].read_bytes()[:4000])
    paths[2].touch()
    return paths


def test_easy_vqa_has_the_published_sizes() -> None:
    train, test = easy_vqa("train"), easy_vqa("test")
    assert (len(train), len(test)) == (4000, 1000)
    assert sum(len(record.questions) for record in train) == 38575
    assert sum(len(record.questions) for record in test) == 9673
    assert not {record.picture for record in train} & {record.picture for record in test}
    assert all(record.picture.is_file() for record in test)


def test_baselines_of_easy_vqa() -> None:
    train, test = easy_vqa("train"), easy_vqa("test")
    majority, blind = majority_baseline(train, test), question_only_baseline(train, test)
    assert majority.asked == blind.asked == 9673
    assert majority.right == max(
        sum(answer == word for record in test for _, answer in record.questions) for word in ("yes", "no")
    )
    assert majority.share < blind.share < 0.7


@pytest.mark.filterwarnings("ignore:skipped corrupt picture")
def test_corrupt_pictures_are_skipped_counted_and_named(pictures: list[Path]) -> None:
    reader = PictureReader(tiny_pixels)
    batch = pack([[sample(path) for path in pictures]], pad_id=0)
    pixels, skipped = reader.fill(batch)
    assert skipped == 3 and set(reader.corrupt) == set(pictures[1:])
    assert pixels.shape == (4, 3, 2, 2) and pixels[0].any() and not pixels[1:].any()
    assert (batch.labels_BL != IGNORE).sum() == 2  # what the good picture teaches
    assert "truncated" in reader.corrupt[pictures[1]]


def test_a_corrupt_picture_is_reported_once(pictures: list[Path]) -> None:
    reader = PictureReader(tiny_pixels)
    with pytest.warns(UserWarning, match="cut.png") as caught:
        assert reader.read(pictures[1]) is None
        assert reader.read(pictures[1]) is None
    assert sum("skipped corrupt" in str(warning.message) for warning in caught) == 1


def test_blank_reads_no_file(tmp_path: Path) -> None:
    reader = PictureReader(tiny_pixels)
    batch = pack([[sample(tmp_path / "nowhere.png")]], pad_id=0)
    pixels, skipped = reader.fill(batch, blank=True)
    assert not pixels.any() and skipped == 0 and (batch.labels_BL != IGNORE).any()


def test_feed_reads_every_sample_once_an_epoch_in_another_order_each() -> None:
    samples = [sample(Path(str(n)), 3 + n % 5) for n in range(50)]
    feed = StreamFeed(samples, capacity=20, seed=1)
    epochs = []
    for _ in range(2):
        streams = feed.next(feed.streams_per_epoch())
        epochs.append([one.picture for stream in streams for one in stream])
        feed.next(0)
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(one.picture for one in samples)
    assert epochs[0] != epochs[1]


def test_feed_resumes_with_the_very_next_stream_across_epochs() -> None:
    samples = [sample(Path(str(n)), 3 + n % 5) for n in range(50)]
    whole, first = (StreamFeed(samples, capacity=20, seed=1) for _ in range(2))
    expected = [whole.next(3) for _ in range(20)]
    for _ in range(7):
        first.next(3)
    state = json.loads(json.dumps(first.state_dict()))
    second = StreamFeed(samples, capacity=20, seed=1)
    second.load_state_dict(state)
    assert [second.next(3) for _ in range(13)] == expected[7:]
    assert second.state.epoch > 0


def test_feed_depends_on_the_seed() -> None:
    samples = [sample(Path(str(n))) for n in range(20)]
    assert StreamFeed(samples, 20, seed=1).next(5) != StreamFeed(samples, 20, seed=2).next(5)


def test_jsonl_records(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"picture": "a.png", "questions": [["what?", "this"], ["and?", "that"]]}) + "\n")
    (record,) = jsonl_records(path)
    assert record.picture == tmp_path / "a.png" and record.questions[1] == ("and?", "that")


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("{", "Expecting property name"),
        ("3", "no object"),
        ("{}", "picture is no path"),
        ('{"picture": 3, "questions": [["a", "b"]]}', "picture is no path"),
        ('{"picture": "a.png"}', "questions is no list"),
        ('{"picture": "a.png", "questions": []}', "at least one question"),
        ('{"picture": "a.png", "questions": "ab"}', "questions is no list"),
        ('{"picture": "a.png", "questions": ["ab"]}', "'ab' is no pair"),
        ('{"picture": "a.png", "questions": [["only one"]]}', "is no pair"),
        ('{"picture": "a.png", "questions": [["how many?", 3]]}', "is no pair of strings"),
        ('{"picture": "a.png", "questions": [["a", "b"], [null, "b"]]}', "is no pair of strings"),
        ('{"picture": "a.png", "questions": [["<image> what?", "b"]]}', "holds <image>"),
        ('{"picture": "a.png", "questions": [["a", "<IMG_CONTEXT>"]]}', "holds <IMG_CONTEXT>"),
        (b"\xff", "utf-8"),
    ],
)
def test_jsonl_names_the_bad_line_and_what_is_wrong(tmp_path: Path, line: str | bytes, wrong: str) -> None:
    path = tmp_path / "data.jsonl"
    good = b'{"picture": "a.png", "questions": [["a", "b"]]}\n'
    path.write_bytes(good + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(InputError, match=f"data.jsonl: line 2: .*{wrong}"):
        jsonl_records(path)


def test_a_line_ends_where_json_lines_end(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"picture": "a.png", "questions": [["one\u2028two\x85", "b"]]}\r\n', encoding="utf-8")
    assert jsonl_records(path)[0].questions == (("one\u2028two\x85", "b"),)
