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
from training.data.balance import Due, due_tiles
from training.data.batch import Row, lay_out
from training.data.conversation import BadRecord
from training.data.order import Order
from training.data.packing import choose, choose_balanced
from training.data.sample import Sample, Samples
from training.errors import InputError

Fault = tuple[str, str]  # where, reason
Key = tuple[int, int, int]  # source, record, part of a record that gave several samples
HOPELESS = 10_000  # bad records in a row
# where a stream's candidates have more or fewer tiles than are due, its rows take a tenth of the difference, in turns,
# and at most a tenth of a row's tiles: half of that where two rows are a micro-batch
PULL, MOST_PULLED = 0.1, 0.1


@dataclass(frozen=True)
class Packing:
    """How rows are made; `due` are the tiles that they are balanced to, None without."""

    capacity: int
    candidates: int
    due: Due | None = None
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
        self.number, self.rows = number, 0
        self.owed = 0.0  # tiles, to where its candidates pull
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
        if (due := self.packing.due) is None:
            return choose(lengths, self.packing.capacity)
        wanted = self._wanted(due, sum(tiles) / max(1, sum(lengths)) * self.packing.capacity)
        order = due.order(self.rows, lengths, tiles, self.packing.capacity)
        self.rows += 1
        lengths, tiles = ([values[place] for place in order] for values in (lengths, tiles))
        return [order[place] for place in choose_balanced(lengths, tiles, self.packing.capacity, wanted)]

    def _wanted(self, due: Due, own: float) -> int:
        """The tiles that are due, moved towards those that its candidates would fill a row with, which would run out of
        tiles or of text else. Neighbors move in turns, so that two together move by half."""
        if due.is_for_long(self.rows):
            return due.few
        most = max(1.0, MOST_PULLED * due.mean)
        self.owed = max(-most, min(most, self.owed + PULL * (own - due.mean)))
        moved = int(self.owed) if (self.rows + self.number) % 2 else 0
        self.owed -= moved
        return max(0, due.of(self.rows) + moved)

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
    """How many of the first records that the streams draw were looked at, and the samples that they gave."""

    records: int
    samples: list[Sample]

    @property
    def tokens(self) -> int:
        """Of all its samples."""
        return sum(map(len, self.samples))


def probe(samples: Samples, *, seed: int, streams: int, records: int = 2048) -> Probe:
    """Of about `records` records; those that cannot be used count as records alone."""
    found: list[Sample] = []
    each = -(-records // streams)
    for number in range(streams):
        order = Order(samples.lengths, samples.weights, seed, number, streams)
        for _ in range(each):
            with suppress(BadRecord):
                found += samples.sample(*order.next())
    return Probe(each * streams, found)


def balanced(samples: Samples, packing: Packing, *, seed: int, streams: int) -> Packing:
    """`packing` with the tiles of a full row of this data."""
    found = probe(samples, seed=seed, streams=streams)
    return replace(packing, due=due_tiles(found.samples, packing.capacity))
