"""The order of draws: a bijection, each record once an epoch over all streams, weights kept at every moment."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.order import Order, mix, permuted


@given(size=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
def test_a_permutation_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permuted(index, size, key) for index in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [2**31, 10**9 + 7])
def test_large_sizes_stay_in_range_and_apart(size: int) -> None:
    seen = {permuted(index, size, 5) for index in range(1000)}
    assert len(seen) == 1000 and min(seen) >= 0 and max(seen) < size


def test_a_permutation_shuffles_evenly() -> None:
    # of 2000 keys, each of 5 elements comes first 400 times, give or take 5 standard deviations (18)
    first = Counter(permuted(0, 5, mix(key)) for key in range(2000))
    assert all(abs(first[element] - 400) < 90 for element in range(5))


def test_mix_is_a_pinned_function() -> None:
    # a checkpoint means these draws: another function would read other data after an upgrade
    assert [mix(0), mix(1, 2, 3), permuted(3, 10, 7)] == [16294208416658607535, 7702586659592502839, 1]


@given(
    streams=st.integers(1, 6),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
def test_all_streams_together_see_an_epoch_once(streams: int, lengths: list[int], epochs: int, seed: int) -> None:
    weights = [1 / len(lengths)] * len(lengths)
    for source, length in enumerate(lengths):
        seen = Counter[int]()
        for number in range(streams):
            order = Order(lengths, weights, seed, number, streams)
            want = len(range(number, epochs * length, streams))  # this stream's part of the epochs
            while order.taken[source] < want:
                drawn, record = order.next()
                if drawn == source:
                    seen[record] += 1
        assert seen == Counter(dict.fromkeys(range(length), epochs))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def records(seed: int) -> list[int]:
        order = Order([50], [1.0], seed, 0, 1)
        return [order.next()[1] for _ in range(100)]

    assert records(1)[:50] != records(1)[50:] and records(1) != records(2)


@given(weights=st.lists(st.integers(1, 20), min_size=1, max_size=5), draws=st.integers(1, 300), seed=st.integers(0, 99))
def test_weights_hold_at_every_moment(weights: list[int], draws: int, seed: int) -> None:
    shares = [weight / sum(weights) for weight in weights]
    order = Order([7] * len(weights), shares, seed, 0, 4)
    for _ in range(draws):
        order.next()
    # golden-ratio points: an interval's count is off by at most a few, growing with the logarithm
    assert all(abs(taken - share * draws) < 6 for taken, share in zip(order.taken, shares, strict=True))


def test_a_source_without_weight_is_never_drawn() -> None:
    order = Order([5, 5, 5], [0.0, 1.0, 0.0], 3, 0, 1)
    assert {order.next()[0] for _ in range(200)} == {1}


def test_state_goes_on_with_the_next_draw() -> None:
    order = Order([9, 4], [0.6, 0.4], 5, 1, 3)
    for _ in range(17):
        order.next()
    again = Order([9, 4], [0.6, 0.4], 5, 1, 3)
    again.load_state_dict(order.state_dict())
    assert [order.next() for _ in range(30)] == [again.next() for _ in range(30)]
