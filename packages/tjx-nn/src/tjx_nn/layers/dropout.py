"""Dropout of the residual stream, with a mask of one bit per feature as the only residual.

Axes in names: B batch, T time, D d_model, P blocks of random bits.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p
from jaxtyping import Array, Bool, Float, UInt8

from tjx_nn.layout import SINGLE_DEVICE, Layout

# A Threefry block has 64 bits: four 16-bit numbers, each of which decides about one feature.
_FEATURES_PER_BLOCK, _LEVELS = 4, 1 << 16


def dropout(
    x: Float[Array, "B T D"], rate: float, key: Array | None, layout: Layout = SINGLE_DEVICE
) -> Float[Array, "B T D"]:
    """Zero features at random and scale the others by 1 / (1 - rate).

    The mask depends only on the key and on the row, token and feature: it is the same on every
    mesh. The derivative is reverse mode only.

    Parameters
    ----------
    x
        Output of a sublayer, tokens in device order.
    rate
        Probability of zeroing a feature, rounded to a multiple of 2**-16.
    key
        PRNG key from `jax.random.key`; None returns `x` unchanged.
    layout
        Layout of the model, for the order of tokens.

    Returns
    -------
    array
        Of the shape and dtype of `x`.

    Examples
    --------
    >>> from tjx_nn import dropout
    >>> y = dropout(jnp.ones((1, 2, 100)), 0.5, jax.random.key(0))
    >>> sorted(set(y.ravel().tolist()))
    [0.0, 2.0]
    """
    dropped = min(round(rate * _LEVELS), _LEVELS - 1)
    if key is None or dropped == 0:
        return x
    bits = layout.reorder(_mask_bits(key, dropped, x.shape))
    return _apply_mask(_LEVELS / (_LEVELS - dropped), x, bits)


def _mask_bits(key: Array, dropped: int, shape: tuple[int, ...]) -> UInt8[Array, "B T P"]:
    """Return the mask, four features per byte: feature d is bit d // P of byte d % P.

    Random bits dominate the arithmetic of dropout on a GPU, and `jax.random.bernoulli` takes a
    Threefry block for each feature.
    """
    batch, length, features = shape
    blocks = -(-features // _FEATURES_PER_BLOCK)
    row, token, block = (
        jax.lax.broadcasted_iota(jnp.uint32, (batch, length, blocks), axis) for axis in range(3)
    )
    seed = [jnp.broadcast_to(word, row.shape) for word in jax.random.bits(key, (2,), jnp.uint32)]
    words = threefry2x32_p.bind(*seed, row, token * blocks + block)  # type: ignore[no-untyped-call]  # as jax is
    numbers = [half for word in words for half in (word & (_LEVELS - 1), word >> 16)]
    keep = [(number >= dropped).astype(jnp.uint8) for number in numbers]
    bits = keep[0] | keep[1] << 1 | keep[2] << 2 | keep[3] << 3
    # Without the barrier XLA recomputes the mask in every consumer.
    barrier: Array = jax.lax.optimization_barrier(bits)  # type: ignore[no-untyped-call]  # as jax is
    return barrier


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply_mask(
    factor: float, x: Float[Array, "B T D"], bits: UInt8[Array, "B T P"]
) -> Float[Array, "B T D"]:
    return jnp.where(_unpack(bits, x.shape[-1]), x * factor, 0).astype(x.dtype)


def _forward(factor: float, x: Array, bits: Array) -> tuple[Array, Array]:
    return _apply_mask(factor, x, bits), bits


def _backward(factor: float, bits: Array, dy: Array) -> tuple[Array, None]:
    return _apply_mask(factor, dy, bits), None


_apply_mask.defvjp(_forward, _backward)


def _unpack(bits: UInt8[Array, "B T P"], features: int) -> Bool[Array, "B T D"]:
    shifts = jnp.arange(_FEATURES_PER_BLOCK, dtype=jnp.uint8)[None, None, :, None]
    unpacked = bits[..., None, :] >> shifts & 1
    return unpacked.reshape(*bits.shape[:-1], -1)[..., :features] == 1
