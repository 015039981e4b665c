"""A mixture of sources, from a file that names them with weights and limits, or of one source alone.

    balance: 0.5                  # weight of a source without its own: records ** balance (1: by size, 0: all equal)
    sources:
      - path: captions.jsonl      # relative paths start at this file's folder
      - path: shards/             # a folder of .tar or .jsonl
        weight: 3                 # of two sources with weights 3 and 1, three records in four are of the first
        limit: 100000             # of this many records, drawn once from all by the seed of the limit

The same as JSON: {"sources": [{"path": "captions.jsonl"}]}.
A weight counts records drawn, and explicit ones stand beside the balanced ones of the others as they are, after these
were scaled to a mean of 1. Source: SAIL-VL2 report, section 3 ("balances dataset ratios"); the formula is ours.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from training.data.conversation import BadRecord, Conversation
from training.data.easy_vqa import NAMES, EasyVqa
from training.data.json_edges import WHITE
from training.data.order import permuted
from training.data.sources import Source, open_source
from training.errors import InputError
from training.yaml_numbers import safe_load

LIMIT_KEY = 20250914


@dataclass(frozen=True)
class Mixture:
    """Sources, and how often each is drawn from; the weights sum to 1."""

    sources: tuple[Source, ...]
    weights: tuple[float, ...]

    @property
    def fingerprint(self) -> list[dict[str, Any]]:
        """What a checkpoint remembers of the data."""
        pairs = zip(self.sources, self.weights, strict=True)
        return [{**source.fingerprint, "weight": weight} for source, weight in pairs]


def usable(mixture: Mixture) -> Iterator[Conversation]:
    """The records of all sources that can be used, in order."""
    for source in mixture.sources:
        for number in range(len(source)):
            try:
                yield source.conversation(number)
            except BadRecord:
                continue


class Limited:
    """`limit` records of a source, spread over all of it."""

    def __init__(self, source: Source, limit: int) -> None:
        self.source, self.limit, self.name = source, min(limit, len(source)), source.name
        self.fingerprint = {**source.fingerprint, "limit": self.limit}

    def __len__(self) -> int:
        return self.limit

    def conversation(self, number: int) -> Conversation:
        """Of the `number`-th record of a fixed random order."""
        return self.source.conversation(permuted(number, len(self.source), LIMIT_KEY))


def open_data(name: str) -> Mixture:
    """What `name` means: 'easy_vqa', a mixture's file, a .jsonl, a .json, a .tar, or a folder. Raises InputError."""
    if name in NAMES:
        return Mixture((EasyVqa(name),), (1.0,))
    path = Path(name)
    if not path.exists():
        raise InputError(f"data: got {name!r}, want {', '.join(NAMES)}, or a file or folder that exists")
    if path.suffix.lower() in (".yaml", ".yml") or _is_json_mixture(path):
        return _read_mixture(path)
    return Mixture((open_source(path),), (1.0,))


def _is_json_mixture(path: Path) -> bool:
    """Whether the file holds an object that has sources, and no list of records."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(1 << 16)
    return head.lstrip(WHITE).startswith(b"{") and b'"sources"' in head


def _read_mixture(path: Path) -> Mixture:
    read = json.loads if path.suffix.lower() == ".json" else safe_load
    try:
        found = read(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: {error}") from error
    _check_keys(f"{path}", found, {"balance", "sources"})
    entries = found.get("sources")
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: sources: want a list with at least one source")
    balance = _number(f"{path}: balance", found.get("balance", 1.0))
    for number, entry in enumerate(entries, start=1):
        _check_keys(f"{path}: source {number}", entry, {"path", "weight", "limit"})
    sources = tuple(_open_entry(path, entry) for entry in entries)
    given = [entry.get("weight") for entry in entries]
    weights = _weights(f"{path}", [len(source) for source in sources], given, balance)
    kept = [(source, weight) for source, weight in zip(sources, weights, strict=True) if weight]
    return Mixture(tuple(source for source, _ in kept), tuple(weight for _, weight in kept))


def _open_entry(path: Path, entry: dict[str, Any]) -> Source:
    named = entry.get("path")
    if not isinstance(named, str) or not named:
        raise InputError(f"{path}: a source without a path: {entry}")
    source: Source = EasyVqa(named) if named in NAMES else open_source(path.parent / named)
    if (limit := entry.get("limit")) is None:
        return source
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise InputError(f"{path}: {named}: limit: got {limit!r}, want a whole number of at least 1")
    return Limited(source, limit)


def _weights(owner: str, sizes: list[int], given: list[Any], balance: float) -> list[float]:
    own = [size for size, weight in zip(sizes, given, strict=True) if weight is None]
    balanced = iter(_balanced(owner, own, balance))
    weights = [next(balanced) if weight is None else _number(f"{owner}: weight", weight) for weight in given]
    total = sum(weights)
    if not total:
        raise InputError(f"{owner}: the weights of all sources are 0")
    shares = [weight / total for weight in weights]
    if lost := [weight for weight, share in zip(weights, shares, strict=True) if weight and not share]:
        raise InputError(f"{owner}: weight: got {lost[0]:g} of {total:g} in all, which is no share of the records")
    return shares


def _balanced(owner: str, sizes: list[int], balance: float) -> list[float]:
    """size ** balance, scaled to a mean of 1."""
    try:
        powers = [size**balance for size in sizes]
    except OverflowError:
        powers = [math.inf]
    mean = sum(powers) / max(1, len(powers))
    if mean == math.inf:
        raise InputError(
            f"{owner}: balance: got {balance:g}, too large for these sources; want 0 (equal) to 1 (by size)"
        )
    return [power / mean for power in powers]


def _number(owner: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
        raise InputError(f"{owner}: got {value!r}, want a number of at least 0")
    return float(value)


def _check_keys(owner: str, found: Any, known: set[str]) -> None:
    if not isinstance(found, dict):
        raise InputError(f"{owner}: got {found!r:.60}, want a mapping with {', '.join(sorted(known))}")
    if unknown := found.keys() - known:
        raise InputError(f"{owner}: got {', '.join(map(str, unknown))}, want only {', '.join(sorted(known))}")
