"""Which samples make a row, and how a row is laid out: positions restart, and nobody sees another's tokens."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from training.data.batch import Batch, Row, collate, lay_out
from training.data.packing import choose, choose_balanced, plan_rows
from training.data.sample import IGNORE, Branch, Ids, Sample

PAD = 99
NO_PIXELS = torch.zeros(0, 3, 2, 2)


def ids(*values: int) -> Ids:
    return np.array(values, dtype=np.int32)


def branch(*values: int) -> Branch:
    return Branch(ids(*values), ids(IGNORE, *values[1:]))


def two_samples() -> list[Sample]:
    return [
        Sample(ids(1, 2, 3), ids(IGNORE, IGNORE, 3), (branch(4, 5), branch(6, 7, 8))),
        Sample(ids(10, 11), ids(IGNORE, IGNORE), (branch(12, 13),)),
    ]


def row(samples: list[Sample], silenced: tuple[int, ...] = ()) -> Row:
    return lay_out(samples, NO_PIXELS, silenced)


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=9), room=st.integers(0, 40))
def test_the_fullest_row_is_found(lengths: list[int], room: int) -> None:
    capacity = lengths[0] + room
    chosen = choose(lengths, capacity)
    assert chosen[0] == 0 and len(set(chosen)) == len(chosen)
    sums = (sum(rest) for k in range(len(lengths)) for rest in combinations(lengths[1:], k))
    assert sum(lengths[n] for n in chosen) == lengths[0] + max(total for total in sums if total <= room)


@given(
    samples=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 4)), min_size=1, max_size=9),
    room=st.integers(0, 60),
    wanted=st.integers(0, 8),
)
def test_a_balanced_row_is_the_cheapest(samples: list[tuple[int, int]], room: int, wanted: int) -> None:
    lengths, tiles = zip(*samples, strict=True)
    capacity = lengths[0] + room
    chosen = choose_balanced(lengths, tiles, capacity, wanted)

    def cost(members: tuple[int, ...]) -> tuple[float, int]:
        free = capacity - sum(lengths[n] for n in members)
        return max(0.0, free / capacity - 0.01) + 0.05 * abs(sum(tiles[n] for n in members) - wanted), free

    others = range(1, len(samples))
    rows = [(0, *rest) for k in range(len(samples)) for rest in combinations(others, k)]
    most = max(wanted, tiles[0]) + 2  # the search goes no further above what is wanted
    fitting = [r for r in rows if sum(lengths[n] for n in r) <= capacity and sum(tiles[n] for n in r) <= most]
    assert chosen[0] == 0 and len(set(chosen)) == len(chosen) and sum(lengths[n] for n in chosen) <= capacity
    assert cost(tuple(chosen))[0] == pytest.approx(min(cost(r) for r in fitting)[0])


@given(lengths=st.lists(st.integers(1, 50), max_size=60), candidates=st.integers(1, 20))
def test_every_sample_is_planned_once(lengths: list[int], candidates: int) -> None:
    rows = plan_rows(lengths, 50, candidates)
    assert sorted(number for planned in rows for number in planned) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in planned) <= 50 for planned in rows)
    for number in range(len(lengths)):  # it is the oldest after as many rows as there were samples before it
        assert any(number in planned for planned in rows[: number + 1])


def test_layout() -> None:
    batch = collate([row(two_samples()), row(two_samples()[1:])], PAD)
    assert batch.input_ids_BL[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13]
    assert batch.position_ids_BL[0].tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 3]
    assert batch.labels_BL[0].tolist() == [IGNORE] * 2 + [3, IGNORE, 5, IGNORE, 7, 8] + [IGNORE] * 3 + [13]
    assert batch.sample_BL[0].tolist() == [1] * 8 + [2] * 4
    assert batch.branch_BL[0].tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 0, 0, 1, 1]
    assert batch.input_ids_BL[1].tolist() == [10, 11, 12, 13] + [PAD] * 8
    assert batch.labels_BL[1].tolist() == [IGNORE] * 3 + [13] + [IGNORE] * 8
    assert batch.token_mask().sum(1).tolist() == [12, 4]
    assert (batch.labels, batch.tokens) == (6, 16)


def test_silenced_samples_alone_teach_nothing() -> None:
    batch = collate([row(two_samples(), silenced=(0,))], PAD)
    assert batch.labels_BL[0].tolist() == [IGNORE] * 11 + [13] and batch.labels == 1


def attention_mask(batch: Batch) -> Tensor:
    """allowed[b, q, k] = k <= q, same sample, and k in the sample's own tokens or in q's branch; bool [B, L, L]."""
    sample, number = batch.sample_BL, batch.branch_BL
    same_sample = sample[:, :, None] == sample[:, None, :]
    visible = (number[:, None, :] == 0) | (number[:, :, None] == number[:, None, :])
    return (same_sample & visible).tril()


@pytest.mark.parametrize("branches", [True, False])
def test_attention_is_the_attention_mask(branches: bool) -> None:
    no_prefix = Sample(ids(), ids(), (branch(14, 15), branch(16, 17)))
    samples = [[*two_samples()], [*two_samples()[1:], no_prefix]]
    if not branches:
        samples = [[Sample(s.ids, s.labels) for s in line if len(s.ids)] for line in samples]
    batch = collate([row(line) for line in samples], PAD)
    total, (count, width) = batch.input_ids_BL.numel(), batch.input_ids_BL.shape
    pack = batch.attention
    assert (pack.keys is not None) == branches  # without branches nothing is gathered
    rows, columns = (torch.arange(total) // width, torch.arange(total) % width)
    if pack.keys is not None:
        rows, columns = pack.keys.rows, pack.keys.columns
    ends = (pack.keys or pack).cu_seqlens.tolist()
    starts = pack.cu_seqlens.tolist()
    allowed = torch.zeros(total, count, width, dtype=torch.bool)
    for first, last, k_first, k_last in zip(starts, starts[1:], ends, ends[1:], strict=False):
        for query in range(first, last):
            seen = slice(k_first, k_last - (last - 1 - query))  # the last query of a sequence sees all of its keys
            allowed[query, rows[seen], columns[seen]] = True
    want = torch.zeros(count, width, count, width, dtype=torch.bool)
    want[range(count), :, range(count)] = attention_mask(batch)
    assert torch.equal(allowed, want.flatten(0, 1))
    assert batch.pairs == int(allowed.sum())


def test_to_moves_everything_and_casts_pixels_alone() -> None:
    batch = collate([lay_out(two_samples(), torch.ones(1, 3, 2, 2)), row(two_samples()[1:])], PAD)
    moved = batch.to(torch.device("meta"), torch.bfloat16)
    assert moved.attention.keys is not None
    found = [value for value in vars(moved).values() if isinstance(value, Tensor)]
    found += [value for part in (moved.attention, moved.attention.keys) for value in part if isinstance(value, Tensor)]
    assert len(found) == 10 and all(value.device.type == "meta" for value in found)
    assert moved.pixels.dtype == torch.bfloat16 and moved.input_ids_BL.dtype == torch.int64
    assert batch.pixels.dtype == torch.float32 and batch.pixels.device.type == "cpu"
