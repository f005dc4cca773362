"""Attention dropout masks as a pure function of a seed and the weight's head, row and key.

All backends and both passes reproduce the same mask, regardless of block sizes. The random bits
come from a 32-bit integer hash with full avalanche (constants from Wellons, "Prospecting for hash
functions", 2018, "lowbias32"), applied once to the row and once to each element.
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
    """Return the dropout mask, bool: each weight is kept with probability 1 - rate.

    The caller multiplies the kept weights by 1 / (1 - rate). The head is added to the first word of
    the seed: a call for the heads from `start` on with the seeds `from_head(seed, start)` gives the
    mask that the call for all heads gives for them.

    Parameters
    ----------
    seed
        The two uint32 words of a batch row's seed.
    head, row, key
        int32 indices in the call, from 0 (not positions). All arrays broadcast against each other.
    rate
        Dropout rate, 0 <= rate < 1.
    """
    first, second = seed
    word = [jnp.asarray(x).astype(jnp.uint32) for x in (head, row, key)]
    of_row = _mix(_mix(_mix(first + word[0]) ^ second) ^ word[1])
    bits = _mix(of_row ^ _mix(word[2] ^ second))
    return bits >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


def seeds(key: jax.Array, batch: int) -> jax.Array:
    """Sample the seed of each batch row, uint32 [batch, 2], from a PRNG key."""
    return jax.random.bits(key, (batch, 2), jnp.uint32)


def from_head(seed: jax.Array, start: Any) -> jax.Array:
    """Return seeds, uint32 [batch, 2], for a call whose head 0 is head `start` of all heads."""
    words = jnp.stack([jnp.asarray(start, jnp.uint32), jnp.uint32(0)])
    return seed + words[None, :]
