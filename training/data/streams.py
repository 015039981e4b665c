"""Logical streams: each draws records in an order of its own, keeps candidates waiting, and packs a row a step.

Their number is the recipe's. Ranks and worker processes only divide them, so the rows do not depend on how many there
are. A stream's state is a few integers and travels with each row: what was read ahead of a checkpoint is forgotten.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from sail_model.images import CorruptImageError
from training.data.batch import Row, lay_out
from training.data.conversation import BadRecord
from training.data.order import Order
from training.data.packing import choose, choose_balanced
from training.data.sample import Sample, Samples
from training.errors import InputError

Fault = tuple[str, str]  # where, reason
Key = tuple[int, int, int]  # source, record, part of a record that gave several samples
HOPELESS = 10_000  # bad records in a row
# every eighth row has half the tiles, in the same step in all streams: there over-long samples find room
LONG_EVERY, LONG_SHARE = 8, 0.5
USUAL_SHARE = (LONG_EVERY - LONG_SHARE) / (LONG_EVERY - 1)


@dataclass(frozen=True)
class Packing:
    """How rows are made. `tiles` is the mean number a row that pictures are balanced to, of `tile_tokens` tokens each;
    None without."""

    capacity: int
    candidates: int
    tiles: float | None = None
    tile_tokens: int = 0
    blank: bool = False


@dataclass
class Drawn:
    """A row, the stream's state behind it, what went wrong on the way, and how many records were drawn for it."""

    row: Row
    state: dict[str, Any]
    faults: list[Fault]
    records: int


class LogicalStream:
    """Stream `number` of `streams` over `samples`."""

    def __init__(self, samples: Samples, packing: Packing, *, seed: int, number: int, streams: int) -> None:
        self.samples, self.packing = samples, packing
        self.order = Order(samples.lengths, samples.weights, seed, number, streams)
        self.waiting: list[tuple[Key, Sample]] = []
        # tiles owed: starts spread over the streams, so that neighbors do not all round up in the same step
        self.owed, self.rows = _radical_inverse(number), 0
        self._faults: list[Fault] = []
        self._records = 0

    def next(self) -> Drawn:
        """The next row. Raises InputError where no record can be used."""
        self._faults, self._records = [], 0
        self._draw()
        places = self._choose()
        taken = [self.waiting[place][1] for place in places]
        chosen = set(places)
        self.waiting = [entry for place, entry in enumerate(self.waiting) if place not in chosen]
        row, faults = decoded_row(taken, self.samples, blank=self.packing.blank)
        return Drawn(row, self.state_dict(), self._faults + faults, self._records)

    def _draw(self) -> None:
        in_a_row = 0
        while len(self.waiting) < self.packing.candidates:
            source, record = self.order.next()
            self._records += 1
            try:
                samples = self.samples.sample(source, record)
            except BadRecord as error:
                self._faults.append((error.where, error.reason))
                in_a_row += 1
                if in_a_row >= min(HOPELESS, 2 * sum(self.samples.lengths)):
                    raise InputError(f"data: no record can be used; {in_a_row} in a row, the last: {error}") from error
                continue
            in_a_row = 0
            self.waiting += [((source, record, part), sample) for part, sample in enumerate(samples)]

    def _choose(self) -> list[int]:
        samples = [sample for _, sample in self.waiting]
        lengths, tiles = [len(sample) for sample in samples], [sample.tiles for sample in samples]
        if self.packing.tiles is None:
            return choose(lengths, self.packing.capacity)
        self.owed += self._tiles_due(sum(tiles), sum(lengths))
        wanted = int(self.owed)
        self.owed -= wanted
        order = self._turns(samples)
        self.rows += 1
        lengths, tiles = ([values[place] for place in order] for values in (lengths, tiles))
        return [order[place] for place in choose_balanced(lengths, tiles, self.packing.capacity, wanted)]

    def _tiles_due(self, tiles: int, tokens: int) -> float:
        """The mean of all streams, moved by at most 2% to where this stream's own candidates pull."""
        assert self.packing.tiles is not None
        mean = self.packing.tiles
        own = tiles / max(1, tokens) * self.packing.capacity
        share = LONG_SHARE if self._for_long else USUAL_SHARE
        return share * min(1.02 * mean, max(0.98 * mean, own))

    @property
    def _for_long(self) -> bool:
        return self.rows % LONG_EVERY == LONG_EVERY - 1

    def _turns(self, samples: Sequence[Sample]) -> list[int]:
        """The oldest comes first, but over-long ones in their own steps, where all streams have fewer tiles."""
        is_long = [self._is_long(sample) for sample in samples]
        long_first = self._for_long or sum(is_long) > len(samples) // 4
        return sorted(range(len(samples)), key=lambda place: is_long[place] != long_first)

    def _is_long(self, sample: Sample) -> bool:
        """Whether it leaves no room for the tiles of a usual row beside its own text."""
        assert self.packing.tiles is not None
        usual = USUAL_SHARE * self.packing.tiles * self.packing.tile_tokens
        return len(sample) - sample.tiles * self.packing.tile_tokens + usual > self.packing.capacity

    def state_dict(self) -> dict[str, Any]:
        """For JSON; waiting samples as their keys."""
        return {
            **self.order.state_dict(),
            "owed": self.owed,
            "rows": self.rows,
            "waiting": [list(key) for key, _ in self.waiting],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the very next row; the samples that waited are read again."""
        self.order.load_state_dict(state)
        self.owed, self.rows = state["owed"], state["rows"]
        self.waiting = []
        read: dict[tuple[int, int], list[Sample]] = {}
        for source, record, part in state["waiting"]:
            if (source, record) not in read:
                read[source, record] = self.samples.sample(source, record)
            self.waiting.append(((source, record, part), read[source, record][part]))


def decoded_row(samples: Sequence[Sample], data: Samples, *, blank: bool = False) -> tuple[Row, list[Fault]]:
    """The samples as a row. Of a picture that cannot be read, or with `blank` of all, the place is kept, blank.

    Of a sample with a picture that cannot be read, nothing is learned.
    """
    pixels, silenced, faults = [torch.zeros(0, *data.tile_shape)], [], []
    for number, sample in enumerate(samples):
        for picture in sample.pictures:
            found = torch.zeros(picture.tiles, *data.tile_shape)
            if not blank:
                try:
                    found = data.pixels(picture)
                except (CorruptImageError, OSError) as error:
                    faults.append((sample.where, f"{type(error).__name__}: {error}"))
                    silenced.append(number)
            pixels.append(found)
    return lay_out(samples, torch.cat(pixels), silenced), faults


class Probe(NamedTuple):
    """What the first records that the streams draw hold together."""

    records: int
    tokens: int
    tiles: int
    image_tokens: int


def probe(samples: Samples, *, seed: int, streams: int, records: int = 2048) -> Probe:
    """Of about `records` records; those that cannot be used count as records alone."""
    found: list[Sample] = []
    each = -(-records // streams)
    for number in range(streams):
        order = Order(samples.lengths, samples.weights, seed, number, streams)
        for _ in range(each):
            with suppress(BadRecord):
                found += samples.sample(*order.next())
    pictures = [picture for sample in found for picture in sample.pictures]
    tiles, image_tokens = (sum(getattr(picture, name) for picture in pictures) for name in ("tiles", "tokens"))
    return Probe(each * streams, sum(map(len, found)), tiles, image_tokens)


def balanced(samples: Samples, packing: Packing, *, seed: int, streams: int) -> Packing:
    """`packing` with the tiles of a full row of this data."""
    found = probe(samples, seed=seed, streams=streams)
    tiles = found.tiles / max(1, found.tokens) * packing.capacity
    return replace(packing, tiles=tiles, tile_tokens=round(found.image_tokens / max(1, found.tiles)))


def _radical_inverse(number: int) -> float:
    """The bits of `number` mirrored at the binary point: 0, 1/2, 1/4, 3/4, 1/8, ... (van der Corput)."""
    value, share = 0.0, 0.5
    while number:
        value += share * (number & 1)
        number, share = number >> 1, share / 2
    return value
