"""The tiles that are due in each step: few where over-long samples come first, and on average those of the data."""

from pathlib import Path

import numpy as np
import pytest

from training.data.balance import Due, due_tiles
from training.data.sample import IGNORE, PictureSlot, Sample

CAPACITY, TOKENS = 1000, 20


def sample(text: int, tiles: int = 0) -> Sample:
    ids = np.zeros(text + tiles * TOKENS, np.int32)
    pictures = (PictureSlot(Path("a.png"), tiles, tiles * TOKENS),) if tiles else ()
    return Sample(ids, np.full(len(ids), IGNORE, np.int32), (), pictures)


def test_without_long_samples_every_step_has_the_mean() -> None:
    due = due_tiles([sample(40, 3)] * 50, CAPACITY)
    assert (due.mean, due.usual, due.tokens, due.share) == (30.0, 30.0, TOKENS, 0.0)
    assert [due.of(step) for step in range(4)] == [30] * 4 and not any(map(due.is_for_long, range(40)))
    assert not any(due.are_long([400, 1000], [0, 50], CAPACITY)) and due.are_long([401], [0], CAPACITY) == [True]


@pytest.mark.parametrize("longest", [750, 900, 1000])
@pytest.mark.parametrize("often", [10, 40])
def test_long_samples_get_steps_in_which_the_longest_has_room(longest: int, often: int) -> None:
    samples = [sample(40, 3)] * 10 * often + [sample(longest - 50 * n) for n in range(2)] * 5
    due = due_tiles(samples, CAPACITY)
    rows = sum(map(len, samples)) / CAPACITY
    assert due.mean == pytest.approx(30 * often / rows)
    assert 1 / 8 <= due.share <= 0.5 and due.share >= min(0.5, 10 / rows)  # a row for each of them
    assert longest + due.few * TOKENS <= CAPACITY and due.few <= due.mean / 2
    assert due.usual * TOKENS <= CAPACITY
    assert sum(map(due.of, range(10_000))) == pytest.approx(10_000 * due.mean, rel=1e-3)
    assert sum(map(due.is_for_long, range(10_000))) == pytest.approx(10_000 * due.share, abs=1)


def test_a_long_sample_with_many_tiles_is_no_reason_for_few() -> None:
    """Its own tiles are most of a row's."""
    due = due_tiles([sample(40, 3)] * 50 + [sample(500, 20)] * 5, CAPACITY)
    assert not due.share


@pytest.mark.parametrize(
    "samples", [[], [sample(900)] * 20, [sample(30)] * 20, [sample(0, 50)] * 20, [sample(980, 1)] * 20]
)
def test_data_that_cannot_be_balanced(samples: list[Sample]) -> None:
    due = due_tiles(samples, CAPACITY)
    assert 0 <= due.few <= due.mean and due.usual * TOKENS <= CAPACITY
    assert all(0 <= due.of(step) <= 50 for step in range(20))


def test_over_long_samples_open_the_rows_of_their_steps() -> None:
    due = Due(15.0, 20.0, TOKENS, 10, 0.5)
    lengths, tiles = [300, 700, 100, 650, 90, 80, 70, 60], [11, 0, 5, 1, 0, 0, 0, 0]
    assert due.order(0, lengths, tiles, CAPACITY) == [0, 2, 4, 5, 6, 7, 1, 3]
    assert due.order(1, lengths, tiles, CAPACITY) == [1, 3, 2, 4, 5, 6, 7, 0]
    # more than a quarter of the candidates: else nothing but they would wait
    assert due.order(0, lengths[:5], tiles[:5], CAPACITY) == [1, 3, 0, 2, 4]
    assert Due(15.0, 15.0, TOKENS, 7).order(0, lengths, tiles, CAPACITY) == [*range(8)]


def test_what_is_due_is_whole_and_adds_up() -> None:
    due = Due(2.25, 2.6, TOKENS, 1, 0.25)
    assert [due.of(step) for step in range(8)] == [2, 3, 2, 1, 3, 3, 2, 1]
