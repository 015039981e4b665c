"""Logical streams: every record once, none starves, state goes on bit for bit, faults travel with their row."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from memory_samples import MemorySamples, labeled

from training.data.order import Order, mix
from training.data.sample import IGNORE, Sample
from training.data.streams import Drawn, LogicalStream, Packing, balanced
from training.errors import InputError

PACKING = Packing(capacity=60, candidates=8)


def stream(samples: MemorySamples, packing: Packing = PACKING, number: int = 0, streams: int = 1) -> LogicalStream:
    return LogicalStream(samples, packing, seed=3, number=number, streams=streams)


def same(one: Drawn, other: Drawn) -> bool:
    arrays = [(getattr(one.row, name), getattr(other.row, name)) for name in ("ids", "positions", "labels")]
    equal = all(np.array_equal(a, b) for a, b in arrays) and torch.equal(one.row.pixels, other.row.pixels)
    return equal and (one.row.runs, one.state, one.faults) == (other.row.runs, other.state, other.faults)


def packed_records(drawn: Drawn) -> list[int]:
    """The record of each sample in the row: its ids are 1000 * source + record."""
    firsts = np.cumsum([0] + [count for count, _, _ in drawn.row.runs])[:-1]
    return [int(drawn.row.ids[at]) for at, (_, _, number) in zip(firsts, drawn.row.runs, strict=True) if number == 0]


@pytest.mark.parametrize("balance", [False, True])
def test_what_was_drawn_is_packed_or_waits_once(balance: bool) -> None:
    samples = MemorySamples()
    packing = balanced(samples, PACKING, seed=3, streams=2) if balance else PACKING
    for number in (0, 1):
        one = stream(samples, packing, number, streams=2)
        found = Counter[int]()
        for _ in range(60):
            drawn = one.next()
            assert 0 < len(drawn.row) <= packing.capacity
            found.update(packed_records(drawn))
        found.update(1000 * source + record for (source, record, _), _ in one.waiting)
        order, want = Order(samples.lengths, samples.weights, 3, number, 2), Counter[int]()
        for source, record in (order.next() for _ in range(one.order.draws)):
            want[1000 * source + record] += len(samples.sample(source, record))
        assert found == want


@pytest.mark.parametrize("balance", [False, True])
def test_no_sample_waits_longer_than_the_bound(balance: bool) -> None:
    # the oldest opens a row: a sample is the oldest after as many rows as there were candidates before it; where
    # rows for over-long ones and for others take turns, after 8 times as many
    samples = MemorySamples()
    packing = balanced(samples, PACKING, seed=3, streams=1) if balance else PACKING
    one = stream(samples, packing)
    since: dict[tuple[int, ...], int] = {}
    for turn in range(200):
        one.next()
        waiting = {(*key, id(sample)) for key, sample in one.waiting}
        since = {key: since.get(key, turn) for key in waiting}
        bound = packing.candidates + 1  # a record of two samples may make one more
        assert max(turn - first for first in since.values()) <= (8 * bound if balance else bound)


@pytest.mark.parametrize("balance", [False, True])
def test_state_goes_on_with_the_very_next_row(balance: bool) -> None:
    samples = MemorySamples(bad=((0, 3),), corrupt=((0, 4), (1, 5)))
    packing = balanced(samples, PACKING, seed=3, streams=1) if balance else PACKING
    one, again = stream(samples, packing), stream(samples, packing)
    for _ in range(7):
        drawn = one.next()
    assert drawn.state["waiting"]
    again.load_state_dict(json.loads(json.dumps(drawn.state)))
    assert all(same(one.next(), again.next()) for _ in range(30))


def test_a_bad_record_is_skipped_and_told_once_an_epoch() -> None:
    samples = MemorySamples(lengths=(10,), weights=(1.0,), bad=((0, 3),))
    one = stream(samples)
    rows = [one.next() for _ in range(40)]
    epochs, rest = divmod(one.order.draws, 10)
    told = [fault for drawn in rows for fault in drawn.faults]
    assert set(told) == {("0: line 3", "is bad")} and epochs <= len(told) <= epochs + (rest > 0)
    assert all(3 not in packed_records(drawn) for drawn in rows)
    assert sum(drawn.records for drawn in rows) == one.order.draws


def test_a_picture_that_cannot_be_read_keeps_its_place() -> None:
    clean, damaged = MemorySamples(), MemorySamples(corrupt=tuple((0, record) for record in range(40)))
    one, other = stream(clean), stream(damaged)
    told = 0
    for _ in range(20):
        want, got = one.next(), other.next()
        assert np.array_equal(want.row.ids, got.row.ids) and want.row.pixels.shape == got.row.pixels.shape
        learned, kept = (drawn.row.labels != IGNORE for drawn in (want, got))
        hurt = {number for number, value in _pictures(want) if value < 1000}
        owner = np.repeat([sample for _, sample, _ in got.row.runs], [count for count, _, _ in got.row.runs])
        assert np.array_equal(kept, learned & ~np.isin(owner, list(hurt)))
        told += len(got.faults)
        assert all(reason == "CorruptImageError: no picture" for _, reason in got.faults)
    assert told > 5


def _pictures(drawn: Drawn) -> list[tuple[int, int]]:
    """(number, record) of the row's samples that have a picture: `mix` makes their count."""
    samples = MemorySamples()
    own = [number for _, number, branch in drawn.row.runs if branch == 0]
    shown = [(n, v) for n, v in zip(own, packed_records(drawn), strict=True)]
    return [(n, value) for n, value in shown if samples.sample(value // 1000, value % 1000)[0].pictures]


def test_blank_pictures_are_zeros_and_nothing_else_changes() -> None:
    samples = MemorySamples()
    seen, blank = stream(samples).next(), stream(samples, Packing(60, 8, blank=True)).next()
    assert np.array_equal(seen.row.ids, blank.row.ids) and np.array_equal(seen.row.labels, blank.row.labels)
    assert seen.row.pixels.all() and seen.row.pixels.shape == blank.row.pixels.shape and not blank.row.pixels.any()


def test_data_without_a_usable_record_is_an_error() -> None:
    samples = MemorySamples(lengths=(4,), weights=(1.0,), bad=tuple((0, record) for record in range(4)))
    with pytest.raises(InputError, match="no record can be used; 8 in a row, the last: 0: line"):
        stream(samples).next()


def test_balance_brings_the_tiles_of_streams_together() -> None:
    samples = MemorySamples(lengths=(4000, 1000))
    plain = Packing(capacity=400, candidates=64)
    spreads = []
    for packing in (plain, balanced(samples, plain, seed=3, streams=4)):
        streams = [stream(samples, packing, number, streams=4) for number in range(4)]
        tiles = np.array([[len(one.next().row.pixels) for one in streams] for _ in range(32)])
        spreads.append(float((tiles.max(1) - tiles.min(1)).mean() / tiles.mean()))
    assert spreads[1] < 0.4 * spreads[0] and spreads[1] < 0.1


class LongTail(MemorySamples):
    """Of 40 records one has so much text that the tiles of a usual row find no room beside it."""

    def sample(self, source: int, record: int) -> list[Sample]:
        found = super().sample(source, record)
        if mix(record, source) % 40:
            return found
        ids = np.full(130 + mix(record) % 40, 1000 * source + record, dtype=np.int32)
        return [Sample(ids, labeled(ids))]


@pytest.mark.parametrize("kind", [MemorySamples, LongTail])
def test_two_rows_have_the_tiles_of_any_other_two(kind: type[MemorySamples]) -> None:
    samples = kind(lengths=(40_000, 10_000))
    packing = balanced(samples, Packing(capacity=200, candidates=128), seed=3, streams=8)
    assert packing.due is not None and bool(packing.due.share) == (kind is LongTail)
    streams = [stream(samples, packing, number, streams=8) for number in range(8)]
    rows = [[one.next().row for one in streams] for _ in range(48)]
    tiles = np.array([[len(row.pixels) for row in step] for step in rows])
    pairs = tiles.reshape(48, 4, 2).sum(2)
    off = np.abs(pairs / pairs.mean(1, keepdims=True) - 1)
    assert off.max() <= 0.05
    assert np.mean([[len(row) for row in step] for step in rows]) > 0.99 * 200
    assert tiles.mean() == pytest.approx(packing.due.mean, rel=0.03)


def test_rows_follow_their_candidates_in_turns() -> None:
    """Where the first records said too little: else the tiles that are left would pile up."""
    samples = MemorySamples(lengths=(40_000, 10_000))
    packing = balanced(samples, Packing(capacity=200, candidates=128), seed=3, streams=4)
    assert packing.due is not None
    low = replace(packing.due, mean=0.97 * packing.due.mean, usual=0.97 * packing.due.usual)
    streams = [stream(samples, replace(packing, due=low), number, streams=4) for number in range(4)]
    tiles = np.array([[len(one.next().row.pixels) for one in streams] for _ in range(60)])
    moved = tiles - np.array([low.of(step) for step in range(60)])[:, None]
    assert not (moved[:, 0::2] * moved[:, 1::2]).any()  # of two neighbors one moves
    assert moved.max() == 1 and tiles[20:].mean() == pytest.approx(packing.due.mean, rel=0.02)
