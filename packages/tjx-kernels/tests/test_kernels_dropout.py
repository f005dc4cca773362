"""Dropout hash: masks are statistically independent Bernoulli samples."""

from typing import Any

import jax
import numpy as np
import pytest

from tjx_kernels.attention import dropout

SEED = (0x9E3779B9, 0x7F4A7C15)
# Of this many standard deviations a right hash errs once in 1e9; the draws are fixed anyway.
SIGMAS = 6


def kept(
    rate: float, heads: Any = (0,), rows: Any = (0,), keys: Any = (0,), seed: Any = SEED
) -> np.ndarray:
    """Bool [heads, rows, keys]."""
    index = np.ix_(*(np.asarray(x, np.int32) for x in (heads, rows, keys)))
    words = tuple(np.full((1, 1, 1), x, np.uint32) for x in seed)
    run = jax.jit(dropout.keep, static_argnums=4)
    found: np.ndarray = jax.device_get(run(*jax.device_put((words, *index)), rate))
    return found


def assert_fair(throws: Any, chance: float = 0.5) -> None:
    deviation = np.sqrt(chance * (1 - chance) / throws.size)
    assert abs(throws.mean() - chance) < SIGMAS * deviation


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_the_rate_is_kept_over_all_and_in_every_row_and_column(rate: float) -> None:
    mask = kept(rate, range(4), range(512), range(512))
    assert_fair(mask, 1 - rate)
    for axes in ((0, 1), (0, 2), (1, 2)):
        means = mask.mean(axes)
        size = mask.size / means.size
        spread = (means - (1 - rate)) / np.sqrt(rate * (1 - rate) / size)
        assert np.max(np.abs(spread)) < SIGMAS
        # As far from the rate as independent throws are, not nearer: no pattern evens them out.
        if means.size > 100:
            assert 0.7 < spread.std() < 1.3


def test_nothing_is_dropped_at_the_rate_0_and_nearly_all_just_below_1() -> None:
    assert kept(0.0, rows=range(100), keys=range(1000)).all()
    assert not kept(1 - 1e-9, rows=range(100), keys=range(1000)).any()


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("lag", [1, 2, 3, 8, 16, 31])
def test_adjacent_weights_are_independent(axis: int, lag: int) -> None:
    mask = kept(0.5, *(range(512 if i in (axis, 2 if axis < 2 else 1) else 4) for i in range(3)))
    near = np.moveaxis(mask, axis, 0)
    differ = near[lag:] ^ near[:-lag]
    assert_fair(differ)
    # Neither do rows differ from one another in the same keys: that would be a mask of the row
    # times a mask of the key.
    assert_fair(differ[..., 1:] ^ differ[..., :-1])


def test_mask_is_not_symmetric_in_rows_keys_and_heads() -> None:
    mask = kept(0.5, [0], range(512), range(512))[0]
    upper = np.triu_indices(512, 1)
    assert_fair((mask ^ mask.T)[upper])
    by_head = kept(0.5, range(512), [0], range(512))[:, 0]
    by_row = kept(0.5, [0], range(512), range(512))[0]
    assert_fair(by_head[1:] ^ by_row[1:])


@pytest.mark.parametrize("word", [0, 1])
@pytest.mark.parametrize("bit", [0, 1, 7, 31])
def test_seeds_that_differ_in_one_bit_give_independent_masks(word: int, bit: int) -> None:
    other = tuple(x ^ (1 << bit if i == word else 0) for i, x in enumerate(SEED))
    # A difference of the seed is not that of a neighbouring row or key either; that of the second
    # word not that of a head.
    a, b = (kept(0.5, range(4), range(256), range(256), seed) for seed in (SEED, other))
    for shift in ((0, 0, 0), (word, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert_fair(a ^ np.roll(b, shift, (0, 1, 2)))


@pytest.mark.parametrize("first", [SEED[0], 2**32 - 3])  # the sum may run over
def test_a_call_for_some_heads_reproduces_their_mask(first: int) -> None:
    seed = (first, SEED[1])
    whole = kept(0.5, range(8), range(64), range(64), seed)
    words = jax.device_put((np.array([seed], np.uint32), np.int32(5)))
    start = jax.device_get(jax.jit(dropout.from_head)(*words))[0]
    np.testing.assert_array_equal(kept(0.5, range(3), range(64), range(64), start), whole[5:])


def test_batch_rows_with_equal_first_words_are_independent() -> None:
    """Heads of two rows may come to one sum; the second words keep them apart."""
    a = kept(0.5, [1], range(256), range(256))
    b = kept(0.5, [0], range(256), range(256), (SEED[0] + 1, SEED[1] ^ 1))
    assert_fair(a ^ b)
    assert_fair((a ^ b)[..., 1:] ^ (a ^ b)[..., :-1])


def test_seeds_of_batch_rows_come_from_the_key() -> None:
    draw: Any = jax.jit(lambda seed: dropout.seeds(jax.random.key(seed), 64))
    one, two = (jax.device_get(draw(jax.device_put(np.uint32(i)))) for i in (1, 2))
    assert one.shape == (64, 2)
    assert one.dtype == np.uint32
    assert len(np.unique(one)) == one.size
    assert not np.intersect1d(one, two).size
