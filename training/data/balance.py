"""How many tiles the rows of a step are to have, the same in all streams, so that every rank encodes as many.

Over-long samples leave no room for the tiles of a usual row: they get steps of their own, in which all rows have few.
Source: SAIL-VL2 report, section 5.1 (visual balance); how is ours (docs/decisions, training-streams-steps).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from training.data.sample import Sample

RARELY = 1 / 8  # of the steps are for over-long samples, at least, where there are any: one waits no longer than that
MORE = 1.25  # times the rows that they need: with none to spare they would pile up
HALF = 0.5  # of the mean tiles, at most, has a row for them
MOST = 0.95  # of a row are tiles, at most
SETTLE = 4  # where rows for over-long samples have fewer tiles, others have more, where then more samples are over-long


@dataclass(frozen=True)
class Due:
    """Tiles of the rows of each step, of `tokens` tokens each: `few` in a `share` of the steps, which are for over-long
    samples; in the others `usual` on average, in all `mean`."""

    mean: float
    usual: float
    tokens: int
    few: int
    share: float = 0.0

    def is_for_long(self, step: int) -> bool:
        """Whether over-long samples come first in this step."""
        return int((step + 1) * self.share) > int(step * self.share)

    def of(self, step: int) -> int:
        """Of each row of this step."""
        if self.is_for_long(step):
            return self.few
        before = step - int(step * self.share)  # usual ones
        return int((before + 1) * self.usual) - int(before * self.usual)

    def are_long(self, lengths: Sequence[int], tiles: Sequence[int], capacity: int) -> list[bool]:
        """Of each sample, whether its text leaves no room for the tiles of a usual row, and its own are at most few."""
        room = capacity - self.usual * self.tokens
        counted = zip(lengths, tiles, strict=True)
        return [count <= self.few and length - count * self.tokens > room for length, count in counted]

    def order(self, step: int, lengths: Sequence[int], tiles: Sequence[int], capacity: int) -> list[int]:
        """Places of waiting samples, oldest first, in the order in which they may open a row of this step.

        Over-long ones wait for their own steps, unless they are more than a quarter; in these, samples with more tiles
        than few come last.
        """
        if not self.share:
            return list(range(len(lengths)))
        is_long = self.are_long(lengths, tiles, capacity)
        if self.is_for_long(step):
            return sorted(range(len(lengths)), key=lambda place: (tiles[place] > self.few, not is_long[place]))
        too_many = sum(is_long) > len(lengths) // 4
        return sorted(range(len(lengths)), key=lambda place: is_long[place] != too_many)


def due_tiles(samples: Sequence[Sample], capacity: int) -> Due:
    """What is due where all data is as these samples: rows for over-long ones are as many as those need, and a little
    more, with so few tiles that the longest finds room."""
    lengths, tiles = [len(sample) for sample in samples], [sample.tiles for sample in samples]
    rows = sum(lengths) / capacity
    mean = sum(tiles) / rows if rows else 0.0
    tokens = round(sum(p.tokens for sample in samples for p in sample.pictures) / max(1, sum(tiles)))
    pictured = zip(lengths, tiles, strict=True)
    beside = sorted(length / count - tokens for length, count in pictured if count)
    words = beside[len(beside) // 4] if beside else 0.0  # with a tile, in samples that have few
    due = Due(mean, mean, tokens, int(HALF * mean))
    for _ in range(SETTLE):
        counted = zip(lengths, tiles, due.are_long(lengths, tiles, capacity), strict=True)
        texts = [length - count * tokens for length, count, is_long in counted if is_long]
        if not texts:
            break
        few = max(0, min(due.few, int((capacity - max(texts)) / (tokens + words))))
        room = capacity - few * tokens
        need = max(sum(text > room / 2 for text in texts), sum(texts) / room)  # two longer ones share no row
        share = max(RARELY, min(0.5, MORE * need / rows))
        few = max(few, math.ceil((mean - (1 - share) * MOST * capacity / tokens) / share))
        due = Due(mean, (mean - share * few) / (1 - share), tokens, few, share)
    return due
