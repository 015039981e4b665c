"""The `easy-vqa` package as a source: 4,000 pictures to train on, 1,000 held out, about ten questions to each."""

import hashlib
import json
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from training.data.conversation import Conversation, Picture, Text, Turn
from training.errors import InputError

# the training split whole, in parts by the kind of answer, and the split held out
NAMES = ("easy_vqa", "easy_vqa:shapes", "easy_vqa:shapes-and-colors", "easy_vqa:balanced", "easy_vqa:test")
SHAPES, YES_NO = {"circle", "rectangle", "triangle"}, {"yes", "no"}
DRAWS = 8  # of `balanced`: each picture comes so often, with other questions

Pairs = list[tuple[str, str]]


class EasyVqa:
    """What one of `NAMES` says. Raises InputError where the package is missing.

    `balanced`: of each question, answers yes and no are equally frequent. A pair with the more frequent answer is kept
    with probability (count of the rarer) / (count of the more frequent), drawn anew for each of a picture's `DRAWS`.
    """

    def __init__(self, name: str) -> None:
        try:
            import easy_vqa as package
        except ModuleNotFoundError as error:
            raise InputError("easy_vqa: the data set is not installed; pip install easy-vqa") from error
        train = name != "easy_vqa:test"
        questions = package.get_train_questions() if train else package.get_test_questions()
        paths = package.get_train_image_paths() if train else package.get_test_image_paths()
        asked: dict[int, list[tuple[str, str]]] = defaultdict(list)
        for question, answer, picture in zip(*questions, strict=True):
            asked[picture].append((question, answer))
        self.name = name
        whole = [(Path(paths[picture]), pairs) for picture, pairs in sorted(asked.items())]
        self._records = [(path, kept) for path, pairs in _chosen(name, whole) if (kept := pairs)]
        text = json.dumps([[path.name, pairs] for path, pairs in self._records])
        digest = hashlib.sha256(text.encode()).hexdigest()
        self.fingerprint: dict[str, Any] = {"records": len(self), "sha256": digest}

    def __len__(self) -> int:
        return len(self._records)

    def conversation(self, number: int) -> Conversation:
        """The `number`-th picture and its questions, independent of each other."""
        path, pairs = self._records[number]
        branches = tuple((Turn("user", (Text(q),)), Turn("assistant", (Text(a),), learn=True)) for q, a in pairs)
        return Conversation((Turn("user", (Picture(path),)),), branches, str(path))


def _chosen(name: str, records: list[tuple[Path, Pairs]]) -> list[tuple[Path, Pairs]]:
    """The pairs of each picture that `name` stands for."""
    if name == "easy_vqa:shapes":
        return [(path, [pair for pair in pairs if pair[1] in SHAPES]) for path, pairs in records]
    if name == "easy_vqa:shapes-and-colors":
        return [(path, [pair for pair in pairs if pair[1] not in YES_NO]) for path, pairs in records]
    return _balanced(records) if name == "easy_vqa:balanced" else records


def _balanced(records: list[tuple[Path, Pairs]]) -> list[tuple[Path, Pairs]]:
    counts = Counter(pair for _, pairs in records for pair in pairs)

    def share(question: str, answer: str) -> float:
        if answer not in YES_NO:
            return 1.0
        return min(counts[question, other] for other in YES_NO) / counts[question, answer]

    generator = random.Random(0)
    return [
        (path, [pair for pair in pairs if generator.random() < share(*pair)])
        for _ in range(DRAWS)
        for path, pairs in records
    ]
