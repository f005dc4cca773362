"""Masked language modelling: which tokens are hidden, and by what."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from tjx_nn import mask_tokens

VOCAB, MASK, SPECIAL = 50, 4, (0, 2, 3)


@functools.partial(jax.jit, static_argnames="rate")
def hide(tokens: jax.Array, seed: jax.Array, rate: float = 0.15) -> tuple[jax.Array, jax.Array]:
    return mask_tokens(
        tokens, jax.random.key(seed), mask_id=MASK, vocab_size=VOCAB, special_ids=SPECIAL, rate=rate
    )


def hidden(tokens: np.ndarray, seed: int, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    inputs, labels = jax.device_get(hide(*jax.device_put((tokens, np.uint32(seed))), **options))
    return inputs, labels


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (100, 1000), np.int32)


def test_shares_are_those_of_the_paper(tokens: np.ndarray) -> None:
    inputs, labels = hidden(tokens, 1)
    ordinary = ~np.isin(tokens, [*SPECIAL, MASK])
    chosen = labels != -100
    assert abs(chosen[ordinary].mean() - 0.15) < 0.005
    masked, kept = inputs[chosen] == MASK, inputs[chosen] == tokens[chosen]
    assert abs(masked.mean() - 0.8) < 0.01
    # A random token is the old one once in 46 times.
    assert abs(kept.mean() - (0.1 + 0.1 / 46)) < 0.01
    np.testing.assert_array_equal(labels[chosen], tokens[chosen])
    np.testing.assert_array_equal(inputs[~chosen], tokens[~chosen])


def test_special_tokens_are_neither_chosen_nor_drawn(tokens: np.ndarray) -> None:
    inputs, labels = hidden(tokens, 2, rate=1.0)
    special = np.isin(tokens, [*SPECIAL, MASK])
    assert (labels[special] == -100).all()
    assert (labels[~special] != -100).all()
    replaced = inputs[~special]
    assert set(np.unique(replaced)) == set(range(VOCAB)) - set(SPECIAL)
    drawn = replaced[(replaced != MASK) & (replaced != tokens[~special])]
    counts = np.bincount(drawn, minlength=VOCAB)[[i not in (*SPECIAL, MASK) for i in range(VOCAB)]]
    assert counts.min() > 0.7 * counts.mean()  # all ordinary tokens are equally likely


def test_a_key_always_hides_the_same(tokens: np.ndarray) -> None:
    first, again, other = (hidden(tokens, seed)[0] for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_everything_wrong_is_named() -> None:
    with jax.transfer_guard("allow"):
        key = jax.random.key(0)
    tokens = np.zeros((1, 1), np.int32)
    with pytest.raises(ValueError, match=r"are from 0 to 9 and vocab_size is 9.*\nrate is 2"):
        mask_tokens(tokens, key, mask_id=9, vocab_size=9, special_ids=[0], rate=2.0)
    with pytest.raises(ValueError, match="leave no other"):
        mask_tokens(tokens, key, mask_id=1, vocab_size=2, special_ids=[0])
