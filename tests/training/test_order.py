"""Draws are a pure function of seed and position: every record once an epoch, sources by their weights."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.order import Order, permuted


@given(size=st.integers(1, 300), key=st.integers(0, 2**64 - 1))
def test_a_permutation_has_every_number_once(size: int, key: int) -> None:
    assert sorted(permuted(index, size, key) for index in range(size)) == list(range(size))


def test_a_permutation_depends_on_its_key_and_is_none_that_one_would_guess() -> None:
    orders = {tuple(permuted(index, 50, key) for index in range(50)) for key in range(20)}
    assert len(orders) == 20 and tuple(range(50)) not in orders
    firsts = Counter(permuted(0, 8, key) for key in range(4000))
    assert max(firsts.values()) < 2 * min(firsts.values()), "the first place is as likely for each"


@pytest.mark.parametrize("streams", [1, 3, 8])
def test_streams_together_see_every_record_once_an_epoch(streams: int) -> None:
    lengths = [24, 48]
    orders = [Order(lengths, [1 / 3, 2 / 3], 5, stream, streams) for stream in range(streams)]
    seen: list[list[int]] = [[], []]
    while len(seen[0]) < 24 or len(seen[1]) < 48:
        for order in orders:
            source, record = order.next()
            if order.taken[source] * streams <= lengths[source]:  # of the first epoch
                seen[source].append(record)
    assert [sorted(records) for records in seen] == [list(range(24)), list(range(48))]


def test_epochs_and_seeds_differ() -> None:
    first = Order([30], [1.0], 1, 0, 1)
    epochs = [[first.next()[1] for _ in range(30)] for _ in range(2)]
    other = Order([30], [1.0], 2, 0, 1)
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    assert [other.next()[1] for _ in range(30)] != epochs[0]


def test_weights_hold_at_every_moment() -> None:
    weights = [0.5, 0.3, 0.2]
    order, counts = Order([1000] * 3, weights, 0, 4, 8), [0, 0, 0]
    for drawn in range(1, 400):
        counts[order.next()[0]] += 1
        assert all(abs(count - weight * drawn) < 4 for count, weight in zip(counts, weights, strict=True))


def test_a_state_goes_on_with_the_next_draw() -> None:
    whole, part = (Order([7, 11], [0.4, 0.6], 3, 2, 5) for _ in range(2))
    expected = [whole.next() for _ in range(60)]
    for _ in range(23):
        part.next()
    resumed = Order([7, 11], [0.4, 0.6], 3, 2, 5)
    resumed.load_state_dict(part.state_dict())
    assert [resumed.next() for _ in range(37)] == expected[23:]
