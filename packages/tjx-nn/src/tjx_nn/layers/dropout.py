"""Dropout of the residual stream; the backward pass keeps a bit for each feature.

Axes in names: B batch, T time, D d_model, P blocks of random bits.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p
from jaxtyping import Array, Bool, Float, UInt8

from tjx_nn.layout import Layout

# A block of Threefry has 64 bits: four numbers of 16 bits, each of which decides on one feature.
_DECISIONS, _LEVELS = 4, 1 << 16


def drop(
    x: Float[Array, "B T D"], rate: float, key: Array | None, layout: Layout
) -> Float[Array, "B T D"]:
    """Set features to 0 with a probability and scale up the rest; nothing without a key.

    The mask is a function of the key, the row, the token and the feature: it is the same on every
    mesh. Reverse mode only.

    Parameters
    ----------
    x
        The output of a sublayer.
    rate
        The probability, rounded to a multiple of 2**-16.
    key
        A key made by `jax.random.key`, or None.
    layout
        The order in which devices hold the tokens.
    """
    dropped = min(round(rate * _LEVELS), _LEVELS - 1)
    if key is None or dropped == 0:
        return x
    return _masked(_LEVELS / (_LEVELS - dropped), x, layout.reorder(_bits(key, dropped, x.shape)))


def _bits(key: Array, dropped: int, shape: tuple[int, ...]) -> UInt8[Array, "B T P"]:
    """Return the mask, four features in each number: feature d is bit d // P of number d % P.

    Random bits cost most of dropout's arithmetic on a GPU; `jax.random.bernoulli` takes a block of
    Threefry for each feature.
    """
    batch, length, features = shape
    blocks = -(-features // _DECISIONS)
    row, token, block = (
        jax.lax.broadcasted_iota(jnp.uint32, (batch, length, blocks), axis) for axis in range(3)
    )
    seed = [jnp.broadcast_to(word, row.shape) for word in jax.random.bits(key, (2,), jnp.uint32)]
    words = threefry2x32_p.bind(*seed, row, token * blocks + block)  # type: ignore[no-untyped-call]  # as jax is
    numbers = [part for word in words for part in (word & (_LEVELS - 1), word >> 16)]
    kept = [(number >= dropped).astype(jnp.uint8) for number in numbers]
    bits = kept[0] | kept[1] << 1 | kept[2] << 2 | kept[3] << 3
    # Computed once, not again wherever the mask is read.
    found: Array = jax.lax.optimization_barrier(bits)  # type: ignore[no-untyped-call]  # as jax is
    return found


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _masked(
    factor: float, x: Float[Array, "B T D"], bits: UInt8[Array, "B T P"]
) -> Float[Array, "B T D"]:
    return jnp.where(_kept(bits, x.shape[-1]), x * factor, 0).astype(x.dtype)


def _forward(factor: float, x: Array, bits: Array) -> tuple[Array, Array]:
    return _masked(factor, x, bits), bits


def _backward(factor: float, bits: Array, dy: Array) -> tuple[Array, None]:
    return _masked(factor, dy, bits), None


_masked.defvjp(_forward, _backward)


def _kept(bits: UInt8[Array, "B T P"], features: int) -> Bool[Array, "B T D"]:
    places = jnp.arange(_DECISIONS, dtype=jnp.uint8)[None, None, :, None]
    unpacked = bits[..., None, :] >> places & 1
    return unpacked.reshape(*bits.shape[:-1], -1)[..., :features] == 1
