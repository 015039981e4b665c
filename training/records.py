"""Pictures and questions: easy-vqa as records, pictures read from disk, an endless resumable feed of streams."""

import hashlib
import json
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from sail_model.chat import IMAGE_PLACEHOLDER
from sail_model.images import CorruptImageError, load_image
from sail_model.tokenizer import IMAGE_CONTEXT, IMAGE_END, IMAGE_START
from training.errors import InputError
from training.packing import PackedBatch, Sample, plan_streams

Split = Literal["train", "test"]
# what questions and answers may not hold: it stands for a picture, which would not be there
RESERVED = (IMAGE_PLACEHOLDER, IMAGE_START, IMAGE_END, IMAGE_CONTEXT)


@dataclass(frozen=True)
class Record:
    """One picture and the (question, answer) pairs about it."""

    picture: Path
    questions: tuple[tuple[str, str], ...]


def easy_vqa(split: Split) -> list[Record]:
    """The records of the `easy-vqa` package: 4,000 pictures to train on, 1,000 held out.

    Raises InputError where the package is missing.
    """
    try:
        import easy_vqa as package
    except ModuleNotFoundError as error:
        raise InputError("easy_vqa: the data set is not installed; pip install easy-vqa") from error
    questions = package.get_train_questions() if split == "train" else package.get_test_questions()
    paths = package.get_train_image_paths() if split == "train" else package.get_test_image_paths()
    asked: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, picture in zip(*questions, strict=True):
        asked[picture].append((question, answer))
    return [Record(Path(paths[picture]), tuple(pairs)) for picture, pairs in sorted(asked.items())]


def jsonl_records(path: Path) -> list[Record]:
    """Records from a file of lines {"picture": path, "questions": [[question, answer], ...]}.

    Relative picture paths start at the file's folder. Raises InputError naming the line that is wrong.
    """
    records = []
    # bytes: text's splitlines would also cut at U+2028 and its like, which JSON allows inside a string
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            records.append(_record(json.loads(line), path.parent))
        except ValueError as error:
            shown = line[:80].decode(errors="replace")
            raise InputError(
                f"{path}: line {number}: got {shown!r}, "
                f'want {{"picture": path, "questions": [[question, answer], ...]}}: {error}'
            ) from error
    if not records:
        raise InputError(f"{path}: no records")
    return records


def fingerprint(records: Sequence[Record]) -> dict[str, Any]:
    """Number and SHA-256 of the records: questions, answers, and the pictures' paths below their common folder.

    Moving the data does not change it; what is in a picture is not looked at.
    """
    root = os.path.commonpath([record.picture.parent.absolute() for record in records])
    digest = hashlib.sha256()
    for record in records:
        picture = os.path.relpath(record.picture.absolute(), root)
        digest.update(json.dumps([picture, record.questions]).encode())
    return {"records": len(records), "sha256": digest.hexdigest()}


def _record(entry: Any, folder: Path) -> Record:
    """One line's record; ValueError says what is wrong with it. Nothing is converted: 3 is no answer, "3" is."""
    if not isinstance(entry, dict):
        raise ValueError("no object")
    picture, questions = entry.get("picture"), entry.get("questions")
    if not isinstance(picture, str) or not picture:
        raise ValueError("picture is no path")
    if not isinstance(questions, list) or not questions:
        raise ValueError("questions is no list with at least one question")  # a picture alone has no tokens to be in
    for pair in questions:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ValueError(f"{pair!r} is no pair of strings")
        if found := [token for token in RESERVED for text in pair if token in text]:
            raise ValueError(f"{pair!r} holds {found[0]}, which stands for a picture")
    return Record(folder / picture, tuple((question, answer) for question, answer in questions))


class PictureReader:
    """Turns picture files into model input; a file that cannot be read is skipped, counted and reported once.

    `prepare` maps a PIL picture to pixel values [C, H, W]. A blank picture is all zeros, the mean color after
    normalization.
    """

    def __init__(self, prepare: Callable[[Image.Image], Tensor]) -> None:
        self.prepare = prepare
        self.blank = torch.zeros_like(prepare(Image.new("RGB", (8, 8))))
        self.corrupt: dict[Path, str] = {}

    def read(self, path: Path) -> Tensor | None:
        """Pixel values [C, H, W], or None where the file is missing, truncated or no picture."""
        if path in self.corrupt:
            return None
        try:
            return self.prepare(load_image(path))
        except (CorruptImageError, OSError) as error:
            self.corrupt[path] = f"{type(error).__name__}: {error}"
            warnings.warn(f"skipped corrupt picture {path}: {self.corrupt[path]}", stacklevel=2)
            return None

    def fill(self, batch: PackedBatch[Path], *, blank: bool = False) -> tuple[Tensor, int]:
        """Pixel values [N, C, H, W] of the batch's pictures, and how many of them were skipped.

        A skipped picture keeps its place, blank, so that every rank runs the same network; nothing is learned
        from its questions. With `blank` no picture is read and all are blank.
        """
        if blank:
            return torch.stack([self.blank] * len(batch.pictures)), 0
        pixels, skipped = [], 0
        for number, path in enumerate(batch.pictures):
            values = self.read(path)
            if values is None:
                batch.silence(number)
                skipped += 1
            pixels.append(self.blank if values is None else values)
        return torch.stack(pixels), skipped


@dataclass
class FeedState:
    """Where a feed stands: `epoch` passes done, `position` streams of the next one read."""

    epoch: int = 0
    position: int = 0


class StreamFeed:
    """Endless packed streams over `samples`, reshuffled each epoch by (seed, epoch); resumable to the stream.

    All ranks build the same feed and take their share, so the order does not depend on how many there are.
    """

    def __init__(self, samples: Sequence[Sample[Path]], capacity: int, seed: int) -> None:
        if not samples:
            raise ValueError("StreamFeed: samples: got none, want at least one")
        self.samples, self.capacity, self.seed = samples, capacity, seed
        self.lengths = [len(sample) for sample in samples]
        self.state = FeedState()
        self._streams = self._plan(0)

    def next(self, count: int) -> list[list[Sample[Path]]]:
        """The next `count` streams; an epoch's last streams and the next epoch's first may share a step."""
        taken: list[list[Sample[Path]]] = []
        while len(taken) < count:
            if self.state.position == len(self._streams):
                self.state = FeedState(self.state.epoch + 1)
                self._streams = self._plan(self.state.epoch)
            taken.append([self.samples[number] for number in self._streams[self.state.position]])
            self.state.position += 1
        return taken

    def streams_per_epoch(self) -> int:
        """Streams of the present epoch."""
        return len(self._streams)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on with the very next stream."""
        return {"epoch": self.state.epoch, "position": self.state.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back (or ahead) to where `state_dict` was taken."""
        self.state = FeedState(**state)
        self._streams = self._plan(self.state.epoch)

    def _plan(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.samples), generator=generator).tolist()
        return plan_streams(self.lengths, order, self.capacity)
