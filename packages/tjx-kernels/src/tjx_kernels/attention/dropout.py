"""Which attention weights dropout keeps: a pure function of the seed and the weight's place.

The backward pass and every implementation find the same weights again, whatever their blocks. The
numbers come from a 32-bit integer hash with full avalanche (constants from Wellons, "Prospecting
for hash functions", 2018, "lowbias32"), applied once to the row and once to each element.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def _mix(x: jax.Array) -> jax.Array:
    x = x ^ lax.shift_right_logical(x, jnp.uint32(16))
    x = x * jnp.uint32(0x7FEB352D)
    x = x ^ lax.shift_right_logical(x, jnp.uint32(15))
    x = x * jnp.uint32(0x846CA68B)
    return x ^ lax.shift_right_logical(x, jnp.uint32(16))


def keep(seed: tuple[jax.Array, jax.Array], head: Any, row: Any, key: Any, rate: float) -> Any:
    """Say which weights are kept: bool, each with the probability 1 - rate.

    `seed` are the two words of a batch row's seed (uint32), `head`, `row` and `key` indices within
    the call (int32, from 0, not positions); all broadcast against each other. What is kept is
    multiplied with 1 / (1 - rate) by the caller.

    A head's number is added to the first word: a call for the heads from `start` on, given the
    seeds `from_head(seed, start)`, keeps what the call for all heads keeps in them.
    """
    first, second = seed
    word = [jnp.asarray(x).astype(jnp.uint32) for x in (head, row, key)]
    of_row = _mix(_mix(_mix(first + word[0]) ^ second) ^ word[1])
    bits = _mix(of_row ^ _mix(word[2] ^ second))
    return bits >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


def seeds(key: jax.Array, batch: int) -> jax.Array:
    """Draw the seed of each batch row, uint32 [batch, 2], from a PRNG key."""
    return jax.random.bits(key, (batch, 2), jnp.uint32)


def from_head(seed: jax.Array, start: Any) -> jax.Array:
    """Give the seeds, uint32 [batch, 2], with which a call's head 0 is the head `start`."""
    words = jnp.stack([jnp.asarray(start, jnp.uint32), jnp.uint32(0)])
    return seed + words[None, :]
