"""The order of an epoch: a permutation for any count, others each time, each equally likely."""

import itertools
import time

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tjx_data.loading import samplers
from tjx_data.loading.samplers import EpochSampler, permute_indices
from tjx_data.loading.stateless_rng import derive_key, draw, fractions, splitmix64

seeds = st.integers(0, 2**64 - 1)
words = st.integers(0, 2**64 - 1)


def _epoch(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """All places of an epoch, without the class."""
    return permute_indices(
        np.arange(count, dtype=np.uint64), count, derive_key(seed, epoch)
    ).astype(np.int64)


def _chi_square(counts: npt.NDArray[np.int64], freedom: int | None = None) -> float:
    """How far counts are from equal, in standard deviations of chi-square."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1 if freedom is None else freedom
    return float((((counts - expected) ** 2).sum() / expected - freedom) / np.sqrt(2 * freedom))


@given(st.integers(1, 5000), seeds, st.integers(0, 2**40), st.sampled_from([1, 500, 1 << 16]))
@settings(max_examples=50, deadline=None)
def test_each_epoch_visits_each_place_once(count: int, seed: int, epoch: int, at_once: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samplers, "_AT_ONCE", at_once)  # few places are permuted in another way
        order = EpochSampler(count, seed)
        turns = np.arange(epoch * count, (epoch + 1) * count)
        places = np.concatenate(
            [order.places(part) for part in np.array_split(turns, 3) if len(part)]
        )
    assert np.bincount(places, minlength=count).tolist() == [1] * count


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9, 63, 64, 65, 255, 257, 65535, 65536, 65537])
def test_any_count_has_permutations(count: int) -> None:
    for seed in range(3):
        assert np.sort(_epoch(count, seed, seed)).tolist() == list(range(count))


def test_no_two_epochs_or_seeds_have_the_same_order() -> None:
    orders = [
        _epoch(50, seed, epoch).tobytes()
        for seed, epoch in itertools.product([0, 1, 2**63, 2**64 - 1], range(200))
    ]
    assert len(set(orders)) == 800


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 7, 9, 16, 33])
def test_every_place_is_equally_likely_at_every_turn(count: int) -> None:
    n_orders = 3000
    orders = np.concatenate([
        EpochSampler(count, seed).places(np.arange(n_orders // 3 * count)).reshape(-1, count)
        for seed in range(3)
    ])  # fmt: skip
    at = np.array([np.bincount(places, minlength=count) for places in orders.T])  # [turn, place]
    assert at.sum() == n_orders * count
    assert _chi_square(at, (count - 1) ** 2) < 5  # rows and columns all add up to n_orders


@pytest.mark.parametrize("count", [3, 4])
def test_every_order_of_few_places_is_equally_likely(count: int) -> None:
    orders = list(itertools.permutations(range(count)))
    n = 200 * len(orders)
    places = EpochSampler(count, 7).places(np.arange(n * count)).reshape(n, count)
    counts = np.array([(places == order).all(axis=1).sum() for order in orders])
    assert counts.sum() == n
    assert _chi_square(counts) < 5


@pytest.mark.parametrize("count", [1000, 4096, 5000, 100_000])
def test_neighbours_in_time_are_not_neighbours_in_the_text(count: int) -> None:
    for epoch in range(4):
        places = _epoch(count, 11, epoch).astype(np.float64)
        bound = 5 / np.sqrt(count)  # five standard deviations
        for lag in (1, 2, 3, 64, count // 2):
            assert abs(np.corrcoef(places[:-lag], places[lag:])[0, 1]) < bound
        assert abs(np.corrcoef(places, np.arange(count))[0, 1]) < bound
        after = _epoch(count, 11, epoch + 1).astype(np.float64)
        assert abs(np.corrcoef(places, after)[0, 1]) < bound
        # A place and its successor come again one after the other as often as by chance: once.
        assert (np.abs(np.diff(places)) == 1).sum() < 2 + 5 * np.sqrt(2)


@given(
    st.integers(1, 300),
    seeds,
    st.lists(st.integers(0, 1500), min_size=1, max_size=40, unique=True),
    st.integers(1, 3),
    st.integers(0, 4),
    st.sampled_from([1, 7, 64, 1 << 16]),
)
@settings(max_examples=50, deadline=None)
def test_places_are_those_of_a_list_made_epoch_by_epoch(
    count: int, seed: int, turns: list[int], stride: int, slack: int, at_once: int
) -> None:
    n_epochs = max(turns) // count + 1
    starts = [int(derive_key(seed, epoch, 1)) % (slack + 1) for epoch in range(n_epochs)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samplers, "_AT_ONCE", at_once)  # several stretches in an epoch
        slow = [
            place * stride + starts[epoch]
            for epoch in range(n_epochs)
            for place in _epoch(count, seed, epoch).tolist()
        ]
        order = EpochSampler(count, seed, stride=stride, slack=slack)
        found = order.places(np.array(sorted(turns)))
        assert found.tolist() == [slow[turn] for turn in sorted(turns)]
        for turn in turns:  # what was asked for before changes nothing
            assert order.places(np.array([turn])).tolist() == [slow[turn]]


def test_starts_of_epochs_use_all_the_slack() -> None:
    order = EpochSampler(1, 3, stride=10, slack=4)
    starts = np.bincount(order.places(np.arange(2000)), minlength=5)
    assert len(starts) == 5
    assert _chi_square(starts) < 5


def test_places_wrap_around_a_ring() -> None:
    order = EpochSampler(4, 3, stride=10, slack=36, ring=37)
    places = order.places(np.arange(2000)).reshape(-1, 4)
    starts = np.bincount(places.ravel(), minlength=37)
    assert len(starts) == 37
    assert _chi_square(starts) < 5
    gaps = np.diff(np.sort(places), append=37 + np.sort(places)[:, :1])
    assert (np.sort(gaps) == [7, 10, 10, 10]).all()


def test_the_millionth_step_is_there_at_once() -> None:
    order = EpochSampler(10_000_000, 1)
    begin = time.perf_counter()
    places = order.places(1_000_000 * 512 + np.arange(512))
    assert time.perf_counter() - begin < 1
    assert len(set(places.tolist())) == 512
    huge = EpochSampler(10**12, 1).places(
        10**15 + np.arange(64)
    )  # of more places than fit anywhere
    assert (huge < 10**12).all()
    assert huge.std() > 10**11


def test_mixing_is_a_bijection_that_changes_half_of_the_bits() -> None:
    inputs = np.arange(100_000, dtype=np.uint64)
    assert len(np.unique(splitmix64(inputs))) == len(inputs)
    for bit in range(64):
        changed = splitmix64(inputs[:2000]) ^ splitmix64(inputs[:2000] ^ np.uint64(1 << bit))
        bits = np.unpackbits(changed.view(np.uint8).reshape(-1, 8), axis=1)
        assert abs(bits.mean() - 0.5) < 0.02
        assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.1


@given(st.lists(words, min_size=1, max_size=4), st.lists(words, min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_keys_differ_where_the_numbers_do(one: list[int], other: list[int]) -> None:
    assert (derive_key(*one) == derive_key(*other)) == (one == other)
    assert derive_key(*one) != derive_key(*one, 0)


@given(
    st.lists(st.integers(0, 2**62), min_size=1, max_size=20, unique=True), words, st.integers(1, 9)
)
@settings(max_examples=50, deadline=None)
def test_draws_are_those_of_the_turn_alone(turns: list[int], seed: int, width: int) -> None:
    key = derive_key(seed)
    together = draw(key, np.array(turns), width)
    assert together.shape == (len(turns), width)
    assert together.dtype == np.uint64
    for turn, row in zip(turns, together, strict=True):
        np.testing.assert_array_equal(draw(key, np.array([turn]), width)[0], row)
        wider = draw(key, np.array([turn]), width + 3)[0]
        np.testing.assert_array_equal(wider[:width], row)


def test_draws_are_uniform_and_have_nothing_to_do_with_each_other() -> None:
    numbers = fractions(draw(derive_key(5), np.arange(20_000), 8))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    for column in numbers.T:
        counts = np.histogram(column, 100, (0, 1))[0]
        assert abs(_chi_square(counts)) < 5
    bound = 5 / np.sqrt(len(numbers))
    across = np.corrcoef(numbers.T) - np.eye(8)
    assert np.abs(across).max() < bound
    for column in numbers.T:
        assert abs(np.corrcoef(column[:-1], column[1:])[0, 1]) < bound
    other = fractions(draw(derive_key(6), np.arange(20_000), 8))
    assert abs(np.corrcoef(numbers.ravel(), other.ravel())[0, 1]) < bound
    assert len(np.unique(draw(derive_key(5), np.arange(20_000), 8))) == 160_000


def test_fractions_reach_no_further_than_below_one() -> None:
    ends = np.array([0, 2**64 - 1], np.uint64)
    assert fractions(ends).tolist() == [0.0, 1 - 2.0**-53]
