"""The `easy-vqa` package as a source: 4,000 pictures to train on, 1,000 held out, about ten questions to each."""

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from training.data.conversation import Conversation, Picture, Text, Turn
from training.errors import InputError

NAMES = {"easy_vqa": "train", "easy_vqa:test": "test"}


class EasyVqa:
    """One of its two splits, `train` or `test`. Raises InputError where the package is missing."""

    def __init__(self, split: str) -> None:
        try:
            import easy_vqa as package
        except ModuleNotFoundError as error:
            raise InputError("easy_vqa: the data set is not installed; pip install easy-vqa") from error
        train = split == "train"
        questions = package.get_train_questions() if train else package.get_test_questions()
        paths = package.get_train_image_paths() if train else package.get_test_image_paths()
        asked: dict[int, list[tuple[str, str]]] = defaultdict(list)
        for question, answer, picture in zip(*questions, strict=True):
            asked[picture].append((question, answer))
        self.name = f"easy_vqa:{split}"
        self._records = [(Path(paths[picture]), pairs) for picture, pairs in sorted(asked.items())]
        text = json.dumps([[path.name, pairs] for path, pairs in self._records])
        self.fingerprint: dict[str, Any] = {
            "records": len(self),
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
        }

    def __len__(self) -> int:
        return len(self._records)

    def conversation(self, number: int) -> Conversation:
        """The `number`-th picture and its questions, independent of each other."""
        path, pairs = self._records[number]
        branches = tuple((Turn("user", (Text(q),)), Turn("assistant", (Text(a),), learn=True)) for q, a in pairs)
        return Conversation((Turn("user", (Picture(path),)),), branches, str(path))
