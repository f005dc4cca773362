"""Samplers and counter-based random numbers: uniform permutations, independent of call order."""

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tjx_data.loading import samplers
from tjx_data.loading.samplers import (
    EpochSampler,
    derive_key,
    permute_indices,
    random_words,
    splitmix64,
    to_unit_interval,
)

seeds = st.integers(0, 2**64 - 1)
words = st.integers(0, 2**64 - 1)


def _epoch(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return all offsets of an epoch without the sampler."""
    return permute_indices(
        np.arange(count, dtype=np.uint64), count, derive_key(seed, epoch)
    ).astype(np.int64)


def _chi_square(counts: npt.NDArray[np.int64], freedom: int | None = None) -> float:
    """Return the chi-square statistic of uniformity, in standard deviations."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1 if freedom is None else freedom
    return float((((counts - expected) ** 2).sum() / expected - freedom) / np.sqrt(2 * freedom))


@given(st.integers(1, 5000), seeds, st.integers(0, 2**40), st.sampled_from([1, 500, 1 << 16]))
@settings(max_examples=50)
def test_each_epoch_has_each_offset_once(
    count: int, seed: int, epoch: int, chunk_size: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samplers, "_CHUNK_SIZE", chunk_size)
        sampler = EpochSampler(count, seed)
        row_indices = np.arange(epoch * count, (epoch + 1) * count)
        offsets = np.concatenate(
            [sampler.offsets(part) for part in np.array_split(row_indices, 3) if len(part)]
        )
    assert np.bincount(offsets, minlength=count).tolist() == [1] * count


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
def test_every_offset_is_equally_likely_at_every_position(count: int) -> None:
    n_orders = 3000
    orders = np.concatenate([
        EpochSampler(count, seed).offsets(np.arange(n_orders // 3 * count)).reshape(-1, count)
        for seed in range(3)
    ])  # fmt: skip
    at = np.array([np.bincount(offsets, minlength=count) for offsets in orders.T])
    assert at.sum() == n_orders * count
    assert _chi_square(at, (count - 1) ** 2) < 5  # rows and columns all add up to n_orders


@pytest.mark.parametrize("count", [3, 4])
def test_every_order_of_few_offsets_is_equally_likely(count: int) -> None:
    orders = list(itertools.permutations(range(count)))
    n = 200 * len(orders)
    offsets = EpochSampler(count, 7).offsets(np.arange(n * count)).reshape(n, count)
    counts = np.array([(offsets == order).all(axis=1).sum() for order in orders])
    assert counts.sum() == n
    assert _chi_square(counts) < 5


@pytest.mark.parametrize("count", [1000, 4096, 5000, 100_000])
def test_consecutive_offsets_are_uncorrelated(count: int) -> None:
    for epoch in range(4):
        offsets = _epoch(count, 11, epoch).astype(np.float64)
        bound = 5 / np.sqrt(count)  # five standard deviations
        for lag in (1, 2, 3, 64, count // 2):
            assert abs(np.corrcoef(offsets[:-lag], offsets[lag:])[0, 1]) < bound
        assert abs(np.corrcoef(offsets, np.arange(count))[0, 1]) < bound
        after = _epoch(count, 11, epoch + 1).astype(np.float64)
        assert abs(np.corrcoef(offsets, after)[0, 1]) < bound
        # A offset and its successor are consecutive again as often as by chance: once.
        assert (np.abs(np.diff(offsets)) == 1).sum() < 2 + 5 * np.sqrt(2)


@given(
    st.integers(1, 300),
    seeds,
    st.lists(st.integers(0, 1500), min_size=1, max_size=40, unique=True),
    st.integers(1, 3),
    st.integers(0, 4),
    st.sampled_from([1, 7, 64, 1 << 16]),
)
@settings(max_examples=50)
def test_offsets_equal_those_of_a_list_built_epoch_by_epoch(
    count: int, seed: int, row_indices: list[int], stride: int, slack: int, chunk_size: int
) -> None:
    n_epochs = max(row_indices) // count + 1
    starts = [int(derive_key(seed, epoch, 1)) % (slack + 1) for epoch in range(n_epochs)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samplers, "_CHUNK_SIZE", chunk_size)  # several chunks per epoch
        slow = [
            offset * stride + starts[epoch]
            for epoch in range(n_epochs)
            for offset in _epoch(count, seed, epoch).tolist()
        ]
        sampler = EpochSampler(count, seed, stride=stride, slack=slack)
        found = sampler.offsets(np.array(sorted(row_indices)))
        assert found.tolist() == [slow[row_index] for row_index in sorted(row_indices)]
        for row_index in row_indices:  # earlier calls change nothing
            assert sampler.offsets(np.array([row_index])).tolist() == [slow[row_index]]


def test_epoch_shift_uses_all_the_slack() -> None:
    sampler = EpochSampler(1, 3, stride=10, slack=4)
    starts = np.bincount(sampler.offsets(np.arange(2000)), minlength=5)
    assert len(starts) == 5
    assert _chi_square(starts) < 5


def test_offsets_wrap_around_a_ring() -> None:
    sampler = EpochSampler(4, 3, stride=10, slack=36, ring=37)
    offsets = sampler.offsets(np.arange(2000)).reshape(-1, 4)
    starts = np.bincount(offsets.ravel(), minlength=37)
    assert len(starts) == 37
    assert _chi_square(starts) < 5
    gaps = np.diff(np.sort(offsets), append=37 + np.sort(offsets)[:, :1])
    assert (np.sort(gaps) == [7, 10, 10, 10]).all()


def test_offsets_are_computed_lazily_for_huge_counts() -> None:
    sampler = EpochSampler(10_000_000, 1)
    offsets = sampler.offsets(1_000_000 * 512 + np.arange(512))
    assert len(set(offsets.tolist())) == 512
    huge = EpochSampler(10**12, 1).offsets(10**15 + np.arange(64))
    assert (huge < 10**12).all()
    assert huge.std() > 10**11


def test_splitmix64_is_a_bijection_that_changes_half_of_the_bits() -> None:
    inputs = np.arange(100_000, dtype=np.uint64)
    assert len(np.unique(splitmix64(inputs))) == len(inputs)
    for bit in range(64):
        changed = splitmix64(inputs[:2000]) ^ splitmix64(inputs[:2000] ^ np.uint64(1 << bit))
        bits = np.unpackbits(changed.view(np.uint8).reshape(-1, 8), axis=1)
        assert abs(bits.mean() - 0.5) < 0.02
        assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.1


@given(st.lists(words, min_size=1, max_size=4), st.lists(words, min_size=1, max_size=4))
@settings(max_examples=50)
def test_keys_differ_where_the_numbers_do(one: list[int], other: list[int]) -> None:
    assert (derive_key(*one) == derive_key(*other)) == (one == other)
    assert derive_key(*one) != derive_key(*one, 0)


@given(
    st.lists(st.integers(0, 2**62), min_size=1, max_size=20, unique=True), words, st.integers(1, 9)
)
@settings(max_examples=50)
def test_random_words_depend_on_the_row_only(row_indices: list[int], seed: int, width: int) -> None:
    key = derive_key(seed)
    together = random_words(key, np.array(row_indices), width)
    assert together.shape == (len(row_indices), width)
    assert together.dtype == np.uint64
    for row_index, row in zip(row_indices, together, strict=True):
        np.testing.assert_array_equal(random_words(key, np.array([row_index]), width)[0], row)
        wider = random_words(key, np.array([row_index]), width + 3)[0]
        np.testing.assert_array_equal(wider[:width], row)


def test_random_words_are_uniform_and_uncorrelated() -> None:
    numbers = to_unit_interval(random_words(derive_key(5), np.arange(20_000), 8))
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
    other = to_unit_interval(random_words(derive_key(6), np.arange(20_000), 8))
    assert abs(np.corrcoef(numbers.ravel(), other.ravel())[0, 1]) < bound
    assert len(np.unique(random_words(derive_key(5), np.arange(20_000), 8))) == 160_000


def test_unit_interval_excludes_one() -> None:
    ends = np.array([0, 2**64 - 1], np.uint64)
    assert to_unit_interval(ends).tolist() == [0.0, 1 - 2.0**-53]
