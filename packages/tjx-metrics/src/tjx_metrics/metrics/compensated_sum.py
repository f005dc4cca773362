"""Sums on the device that are as good as float64 and int64, without either.

TPUs have no float64 and JAX has it switched off, while a corpus has 1e9 tokens and more: a float32
sum of their losses, carried from batch to batch, would be wrong in the fourth digit, and an int32
sum of their bytes overflows. Two 32-bit numbers for each sum do. Both are plain pytrees: they are
carried, added and reduced inside ``jax.jit``, on any mesh.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class FloatSum(NamedTuple):
    """A sum of float32 numbers, `high` + `low`, good to ten digits and more.

    The error of an array of n numbers is below 1e-10 of their largest times n for n up to 2**20.

    Attributes
    ----------
    high, low : float32 array []
        The sum rounded to float32, and what was rounded off.
    """

    high: jax.Array
    low: jax.Array

    @staticmethod
    def zero() -> "FloatSum":
        """Return the sum of nothing."""
        zero = jnp.zeros((), jnp.float32)
        return FloatSum(zero, zero)

    def plus(self, values: jax.Array) -> "FloatSum":
        """Add all of an array.

        Parameters
        ----------
        values : float array of any shape
            Of float32 or a type that it holds. On a mesh each device adds its own part of it.

        Returns
        -------
        FloatSum
            The sum with them; not finite where one of them is not.
        """
        high, low = self
        for part in _parts(values.astype(jnp.float32)):
            high, error = _two_sum(high, part)
            low = low + error
        return FloatSum(*_two_sum(high, low))

    def on_host(self) -> float:
        """Read the sum in float64; waits for the device."""
        high, low = jax.device_get(self)
        return float(high) + float(low)


class IntSum(NamedTuple):
    """Sums of counts, below 2**64: `high` * 2**32 + `low`.

    Attributes
    ----------
    high, low : uint32 array [...]
        One sum for each place.
    """

    high: jax.Array
    low: jax.Array

    @staticmethod
    def zero(shape: tuple[int, ...] = ()) -> "IntSum":
        """Return sums of nothing."""
        zero = jnp.zeros(shape, jnp.uint32)
        return IntSum(zero, zero)

    def plus(self, counts: jax.Array) -> "IntSum":
        """Add a count to each sum.

        Parameters
        ----------
        counts : int array [...]
            One for each sum, none negative.
        """
        low = self.low + counts.astype(jnp.uint32)
        carried = low < self.low  # uint32 went round
        return IntSum(self.high + carried.astype(jnp.uint32), low)

    def on_host(self) -> list[int]:
        """Read the sums, flattened; waits for the device."""
        high, low = jax.device_get(self)
        pairs = zip(np.ravel(high).tolist(), np.ravel(low).tolist(), strict=True)
        return [(h << 32) + n for h, n in pairs]


def _two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the rounded sum and its rounding error, exactly (Knuth, TAOCP vol. 2, 4.2.2)."""
    total = a + b
    b_seen = total - a
    error = (a - (total - b_seen)) + (b - b_seen)
    # An infinite sum has no error; inf - inf would make it NaN.
    return total, jnp.where(jnp.isfinite(total), error, 0)


def _parts(x: jax.Array) -> list[jax.Array]:
    """Return float32 scalars whose sum is that of `x`, whatever the order of adding.

    The leading digits of all elements, cut at one place, add up without any rounding, as does the
    next slice of digits: Rump, Ogita and Oishi, "Accurate floating-point summation, part I", 2008,
    algorithm 3.2. What is below three slices is small enough to be added plainly.
    """
    bits = (x.size + 1).bit_length()  # 2**bits is at least x.size + 2
    _, exponent = jnp.frexp(jnp.max(jnp.abs(x), initial=0.0))
    slices, rest = [], x
    for _ in range(3):
        exponent = exponent + bits
        place = jnp.ldexp(jnp.ones((), jnp.float32), exponent)
        leading = (place + rest) - place
        slices.append(leading.sum())
        rest = rest - leading
        exponent = exponent - 24  # the digits of float32: all of `rest` is below
    # Infinity, NaN, and numbers too near the largest have no such slices.
    plain = x.sum()
    is_cut = jnp.isfinite(slices[0]) & jnp.isfinite(plain)
    below = [jnp.where(is_cut, part, 0) for part in (*slices[1:], rest.sum())]
    return [jnp.where(is_cut, slices[0], plain), *below]
