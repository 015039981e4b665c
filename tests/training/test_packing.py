"""Packed streams: every sample once, none truncated, positions restart, and nobody sees another's tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from training.packing import IGNORE, Branch, PackedBatch, Sample, pack, plan_streams, split_to_fit

PAD = 99


def branch(*ids: int) -> Branch:
    return Branch(ids, (IGNORE,) + ids[1:])


def two_samples() -> list[Sample[str]]:
    return [
        Sample("a", (1, 2, 3), (branch(4, 5), branch(6, 7, 8))),
        Sample("b", (10, 11), (branch(12, 13),)),
    ]


@given(
    lengths=st.lists(st.integers(1, 50), max_size=80),
    capacity=st.integers(50, 120),
    buffer_size=st.integers(1, 20),
)
def test_every_sample_is_packed_exactly_once(lengths: list[int], capacity: int, buffer_size: int) -> None:
    streams = plan_streams(lengths, range(len(lengths)), capacity, buffer_size)
    assert sorted(number for stream in streams for number in stream) == list(range(len(lengths)))
    assert all(0 < sum(lengths[number] for number in stream) <= capacity for stream in streams)


def test_a_sample_that_fits_badly_does_not_starve() -> None:
    # the long one fits beside no other; with a buffer of 4 it must still come within 4 streams of entering it
    lengths = [50] + [60, 40] * 50
    streams = plan_streams(lengths, [1, 2, 0, *range(3, len(lengths))], 100, buffer_size=4)
    assert any(0 in stream for stream in streams[:4])


def test_streams_are_well_filled() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(60, 240, (2000,), generator=generator).tolist()
    streams = plan_streams(lengths, range(2000), 512)
    assert sum(lengths) / (512 * len(streams)) > 0.95


def test_a_longer_sample_than_a_stream_is_an_error() -> None:
    with pytest.raises(ValueError, match="sample 1 has 11 tokens, a stream holds 10"):
        plan_streams([3, 11], range(2), 10)


def test_split_repeats_the_prefix_and_keeps_every_branch() -> None:
    sample = Sample("a", (1, 2, 3), tuple(branch(10 * n, 10 * n + 1) for n in range(1, 6)))
    parts = split_to_fit(sample, 8)
    assert [len(part) for part in parts] == [7, 7, 5]
    assert all(part.prefix_ids == (1, 2, 3) and part.picture == "a" for part in parts)
    assert tuple(b for part in parts for b in part.branches) == sample.branches
    assert split_to_fit(sample, 100) == [sample]


def test_split_never_truncates() -> None:
    with pytest.raises(ValueError, match="need 5 tokens, a stream holds 4"):
        split_to_fit(Sample("a", (1, 2, 3), (branch(4, 5),)), 4)


def test_layout_of_one_stream() -> None:
    batch = pack([two_samples(), two_samples()[1:]], PAD)
    assert batch.input_ids_BL[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13]
    assert batch.position_ids_BL[0].tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 3]
    assert batch.labels_BL[0].tolist() == [IGNORE] * 4 + [5, IGNORE, 7, 8] + [IGNORE] * 3 + [13]
    assert batch.sample_BL[0].tolist() == [1] * 8 + [2] * 4
    assert batch.branch_BL[0].tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 0, 0, 1, 1]
    assert batch.input_ids_BL[1].tolist() == [10, 11, 12, 13] + [PAD] * 8
    assert batch.token_mask().sum(1).tolist() == [12, 4]
    assert batch.pictures == ["a", "b", "b"] and batch.owners == [(0, 1), (0, 2), (1, 1)]


def attention_mask(batch: PackedBatch) -> Tensor:
    """allowed[b, q, k] = k <= q, same sample, and k in the prefix or in q's branch; bool [B, L, L]."""
    sample, branch = batch.sample_BL, batch.branch_BL
    same_sample = sample[:, :, None] == sample[:, None, :]
    visible = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    return (same_sample & visible).tril()


def test_attention_mask_by_hand() -> None:
    allowed = attention_mask(pack([two_samples()], PAD))[0]
    sees = {query: allowed[query].nonzero().flatten().tolist() for query in range(12)}
    assert sees[2] == [0, 1, 2]
    assert sees[4] == [0, 1, 2, 3, 4]  # first branch: the prefix and itself
    assert sees[5] == [0, 1, 2, 5]  # second branch: not the first
    assert sees[7] == [0, 1, 2, 5, 6, 7]
    assert sees[8] == [8]  # second sample: nothing of the first
    assert sees[11] == [8, 9, 10, 11]


def test_padding_attends_to_something_and_nothing_attends_to_it() -> None:
    allowed = attention_mask(pack([two_samples(), two_samples()[1:]], PAD))[1]
    assert allowed.any(-1).all()  # a row of False gives NaN
    assert not allowed[:4, 4:].any()
    assert not allowed[4:, :4].any()


def test_attention_is_the_attention_mask() -> None:
    no_prefix = Sample("c", (), (branch(14, 15), branch(16, 17)))
    batch = pack([two_samples(), [*two_samples()[1:], no_prefix]], PAD)
    allowed = torch.zeros(24, 2, 12, dtype=torch.bool)
    attended = batch.attention
    assert attended.keys is not None
    bounds = zip(*(cu.unfold(0, 2, 1).tolist() for cu in (attended.cu_seqlens, attended.keys.cu_seqlens)), strict=True)
    for (first, last), (k_first, k_last) in bounds:
        for query in range(first, last):
            seen = slice(k_first, k_last - (last - 1 - query))  # the last query of a sequence sees all of its keys
            allowed[query, attended.keys.rows[seen], attended.keys.columns[seen]] = True
    want = torch.zeros(2, 12, 2, 12, dtype=torch.bool)
    want[[0, 1], :, [0, 1]] = attention_mask(batch)
    assert torch.equal(allowed, want.flatten(0, 1))
    assert attended.max_seqlen == 4 and attended.keys.max_seqlen == 6
    assert attended.pairs() == int(allowed.sum())


def test_silence_takes_the_labels_of_one_sample_only() -> None:
    batch = pack([two_samples()], PAD)
    before = batch.labels_BL.clone()
    batch.silence(1)
    assert (batch.labels_BL[0, 8:] == IGNORE).all()
    assert torch.equal(batch.labels_BL[0, :8], before[0, :8])


@pytest.mark.parametrize(("ids", "labels"), [((1, 2), (IGNORE,)), ((1, 2), (1, 2))])
def test_branch_refuses_labels_that_would_leak(ids: tuple[int, ...], labels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="Branch: labels"):
        Branch(ids, labels)


def test_a_picture_that_nobody_asks_about_is_no_sample() -> None:
    # it would have a picture but no tokens to put it in
    with pytest.raises(ValueError, match="Sample: branches: got none for a.png"):
        Sample("a.png", (), ())
