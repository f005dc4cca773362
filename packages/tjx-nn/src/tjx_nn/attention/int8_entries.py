"""Int8 entries of the KV cache: keys and values with a scale for each token and head.

Axes in names: B batch, S slots or tokens, K key heads, H features of a head.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_MAX = 127.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Entries:
    """Cache entries ``values * scale``, in the place of an array.

    As a node of a pytree it can also hold shapes.

    Attributes
    ----------
    values : int8 [batch, slots, heads, features]
        Rounded entries in units of `scale`.
    scale : float32 [batch, slots, heads]
        Scale of each token and head.
    """

    values: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the entries."""
        shape: tuple[int, ...] = self.values.shape
        return shape


def quantize_entries(x: Float[Array, "B S K H"]) -> Int8Entries:
    """Round entries to multiples of the largest feature of each token and head / 127."""
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(-1)
    scale = jnp.where(largest > 0, largest / _MAX, 1.0)
    return Int8Entries(jnp.round(x / scale[..., None]).astype(jnp.int8), scale)
