"""Rows are filled as well as they can be, nothing starves, and nobody sees another's tokens."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from training.data.batch import Batch, Row, collate, lay_out
from training.data.packing import choose, choose_balanced, plan_rows
from training.data.sample import IGNORE, Branch, Sample

PAD = 99


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def branch(*values: int) -> Branch:
    return Branch(ids(*values), ids(IGNORE, *values[1:]))


def sample(*values: int, branches: tuple[Branch, ...] = (), learn: bool = False) -> Sample:
    labels = ids(IGNORE, *values[1:]) if learn else ids(*[IGNORE] * len(values))
    return Sample(ids(*values), labels, branches)


def row(*samples: Sample, silenced: tuple[int, ...] = ()) -> Row:
    return lay_out(samples, torch.zeros(0, 3, 1, 1), silenced)


A = sample(1, 2, 3, branches=(branch(4, 5), branch(6, 7, 8)))
B = sample(10, 11, branches=(branch(12, 13),))


# ---- which samples make a row
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=9), capacity=st.integers(30, 60))
def test_the_best_row_with_the_oldest_sample(lengths: list[int], capacity: int) -> None:
    chosen = choose(lengths, capacity)
    rest = range(1, len(lengths))
    sums = [sum(lengths[n] for n in (0, *some)) for k in range(len(lengths)) for some in combinations(rest, k)]
    assert chosen[0] == 0 and chosen == sorted(set(chosen))
    assert sum(lengths[n] for n in chosen) == max(total for total in sums if total <= capacity)


@given(
    entries=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 5)), min_size=1, max_size=9),
    wanted=st.integers(0, 12),
)
def test_a_balanced_row_has_the_tiles_wanted_where_one_that_is_full_has(
    entries: list[tuple[int, int]], wanted: int
) -> None:
    lengths, tiles = zip(*entries, strict=True)
    chosen = choose_balanced(lengths, tiles, 40, wanted)
    assert chosen[0] == 0 and chosen == sorted(set(chosen)) and sum(lengths[n] for n in chosen) <= 40
    rest = range(1, len(entries))
    rows = [(0, *some) for k in range(len(entries)) for some in combinations(rest, k)]
    full = [r for r in rows if sum(lengths[n] for n in r) == 40 and sum(tiles[n] for n in r) == wanted]
    if full:
        assert sum(tiles[n] for n in chosen) == wanted and sum(lengths[n] for n in chosen) == 40


@given(lengths=st.lists(st.integers(1, 50), max_size=60), candidates=st.integers(1, 20))
def test_every_sample_is_in_one_row(lengths: list[int], candidates: int) -> None:
    rows = plan_rows(lengths, 60, candidates)
    assert sorted(number for found in rows for number in found) == list(range(len(lengths)))
    assert all(0 < sum(lengths[number] for number in found) <= 60 for found in rows)


def test_a_sample_that_fits_badly_does_not_starve() -> None:
    lengths = [60, 40, 50] + [60, 40] * 50  # the third fits beside no other, but comes when it is the oldest
    assert [2] in plan_rows(lengths, 100, 8)[:3]


# ---- rows as tensors
def test_layout() -> None:
    batch = collate([row(A, B), row(B)], PAD)
    assert batch.input_ids_BL[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13]
    assert batch.position_ids_BL[0].tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 3]
    assert batch.labels_BL[0].tolist() == [IGNORE] * 4 + [5, IGNORE, 7, 8] + [IGNORE] * 3 + [13]
    assert batch.sample_BL[0].tolist() == [1] * 8 + [2] * 4
    assert batch.branch_BL[0].tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 0, 0, 1, 1]
    assert batch.input_ids_BL[1].tolist() == [10, 11, 12, 13] + [PAD] * 8
    assert batch.token_mask().sum(1).tolist() == [12, 4]
    assert (batch.labels, batch.tokens) == (5, 16)


def attention_mask(batch: Batch) -> Tensor:
    """allowed[b, q, k] = k <= q, same sample, and k in the sample's own tokens or in q's branch; bool [B, L, L]."""
    sample_BL, branch_BL = batch.sample_BL, batch.branch_BL
    same_sample = sample_BL[:, :, None] == sample_BL[:, None, :]
    visible = (branch_BL[:, None, :] == 0) | (branch_BL[:, :, None] == branch_BL[:, None, :])
    return (same_sample & visible).tril()


def test_attention_mask_by_hand() -> None:
    allowed = attention_mask(collate([row(A, B)], PAD))[0]
    sees = {query: allowed[query].nonzero().flatten().tolist() for query in range(12)}
    assert sees[2] == [0, 1, 2]
    assert sees[4] == [0, 1, 2, 3, 4]  # first branch: what comes before all branches, and itself
    assert sees[5] == [0, 1, 2, 5]  # second branch: not the first
    assert sees[7] == [0, 1, 2, 5, 6, 7]
    assert sees[8] == [8]  # second sample: nothing of the first


@pytest.mark.parametrize(
    "rows",
    [[[A, B], [B, sample(branches=(branch(14, 15), branch(16, 17)))]], [[sample(1, 2, 3), sample(4, 5)], [sample(6)]]],
    ids=["branches", "plain"],
)
def test_attention_is_the_attention_mask(rows: list[list[Sample]]) -> None:
    batch = collate([row(*samples) for samples in rows], PAD)
    count, width = batch.input_ids_BL.shape
    keys = batch.attention.keys
    assert (keys is not None) == any(found.branches for samples in rows for found in samples)
    allowed = torch.zeros(count * width, count * width, dtype=torch.bool)
    places = torch.arange(count * width) if keys is None else keys.rows * width + keys.columns
    both = (batch.attention.cu_seqlens, (keys or batch.attention).cu_seqlens)
    bounds = zip(*(cu_seqlens.unfold(0, 2, 1).tolist() for cu_seqlens in both), strict=True)
    for (first, last), (k_first, k_last) in bounds:
        for query in range(first, last):
            # the last query of a sequence sees all of its keys
            allowed[query, places[slice(k_first, k_last - (last - 1 - query))]] = True
    wanted = torch.zeros(count, width, count, width, dtype=torch.bool)
    for number, mask in enumerate(attention_mask(batch)):
        wanted[number, :, number] = mask
    assert torch.equal(allowed, wanted.flatten(2).flatten(0, 1))
    assert batch.pairs == int(allowed.sum())


def test_a_silenced_sample_teaches_nothing() -> None:
    labels = collate([row(A, B, silenced=(1,))], PAD).labels_BL[0]
    assert (labels[8:] == IGNORE).all() and torch.equal(labels[:8], collate([row(A)], PAD).labels_BL[0])


def test_a_batch_on_another_device_and_in_another_dtype() -> None:
    batch = collate([row(A, B)], PAD).to(torch.device("meta"), torch.bfloat16)
    assert batch.pixels.dtype == torch.bfloat16 and batch.input_ids_BL.dtype == torch.int64
    assert batch.attention.keys is not None
    tensors = (batch.labels_BL, batch.attention.cu_seqlens, batch.attention.keys.rows, batch.attention.keys.cu_seqlens)
    assert all(tensor.is_meta for tensor in tensors)
