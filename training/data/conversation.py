"""A training record as its reader gives it: a conversation of turns, a turn of parts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Text:
    """Words. `<image>` in them is text, never a picture."""

    text: str


@dataclass(frozen=True)
class Picture:
    """A picture, not decoded: a path, or the bytes of its file. `max_tiles` bounds its tiles below the processor's.

    A video is a picture a frame, each of one tile, with its label as text before it.
    """

    source: Path | bytes
    max_tiles: int | None = None


Part = Text | Picture


@dataclass(frozen=True)
class Turn:
    """What one side says; with `learn`, its text and end token are what the model is trained to write."""

    role: Role
    parts: tuple[Part, ...]
    learn: bool = False


@dataclass(frozen=True)
class Conversation:
    """`turns` one after the other; or, with `branches`, several conversations that begin with `turns`.

    Branches are independent of each other: many questions about one picture, which is then encoded once. The first
    turn of a branch goes on with the last of `turns` where both have the same role.
    """

    turns: tuple[Turn, ...]
    branches: tuple[tuple[Turn, ...], ...] = ()
    where: str = ""  # "file.jsonl: line 3", for reports


class BadRecord(ValueError):
    """A record that cannot be used: skipped, counted and reported. `where` names file and line or shard and key."""

    def __init__(self, where: str, reason: str) -> None:
        self.where, self.reason = _printable(where), _printable(reason)
        super().__init__(f"{self.where}: {self.reason}")

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.where, self.reason)  # it travels between processes


def _printable(text: str) -> str:
    """Without halves of surrogate pairs, which JSON and names of files can hold and a log cannot."""
    return text.encode(errors="backslashreplace").decode()
