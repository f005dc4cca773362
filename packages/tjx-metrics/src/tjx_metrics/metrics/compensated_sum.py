"""Sum float32 losses and integer counts on the device with float64 and int64 accuracy.

TPUs have no float64, and JAX disables it by default. A float32 sum over 1e9 token losses is wrong
in the fourth digit, and an int32 sum of their bytes overflows. Each sum here is a pair of 32-bit
numbers in a plain pytree, so it can be carried, added and reduced under ``jax.jit`` on any mesh.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class FloatSum(NamedTuple):
    """Sum of float32 values as `high` + `low`, accurate to at least ten digits.

    The error of adding an array of n values is below 1e-10 * n * max(abs(values)) for n up to
    2**20.

    Attributes
    ----------
    high, low : float32 array []
        The sum rounded to float32, and the rounding error.
    """

    high: jax.Array
    low: jax.Array

    @staticmethod
    def zero() -> "FloatSum":
        """Return a zero sum."""
        zero = jnp.zeros((), jnp.float32)
        return FloatSum(zero, zero)

    def plus(self, values: jax.Array) -> "FloatSum":
        """Add all elements of an array.

        Parameters
        ----------
        values : float array of any shape
            float32 or a narrower type. On a mesh, each device adds its own shard.

        Returns
        -------
        FloatSum
            The new sum; not finite if any value is not finite.
        """
        high, low = self
        for part in _exact_parts(values.astype(jnp.float32)):
            high, error = _two_sum(high, part)
            low = low + error
        return FloatSum(*_two_sum(high, low))

    def on_host(self) -> float:
        """Return the sum as a float64 number. Blocks until the device has computed it."""
        high, low = jax.device_get(self)
        return float(high) + float(low)


class IntSum(NamedTuple):
    """Sums of counts below 2**64, stored as `high` * 2**32 + `low`.

    Attributes
    ----------
    high, low : uint32 array [...]
        One sum per element.
    """

    high: jax.Array
    low: jax.Array

    @staticmethod
    def zero(shape: tuple[int, ...] = ()) -> "IntSum":
        """Return zero sums of the given shape.

        Parameters
        ----------
        shape : tuple of int
            Shape of the sums.

        Returns
        -------
        IntSum
            Sums on the device.
        """
        zero = jnp.zeros(shape, jnp.uint32)
        return IntSum(zero, zero)

    def plus(self, counts: jax.Array) -> "IntSum":
        """Add one count to each sum.

        Parameters
        ----------
        counts : int array [...]
            Non-negative counts, of the shape of the sums.

        Returns
        -------
        IntSum
            The new sums.
        """
        low = self.low + counts.astype(jnp.uint32)
        carry = low < self.low  # the uint32 addition overflowed
        return IntSum(self.high + carry.astype(jnp.uint32), low)

    def on_host(self) -> list[int]:
        """Return the flattened sums as Python ints. Blocks until the device has computed them."""
        high, low = jax.device_get(self)
        pairs = zip(np.ravel(high).tolist(), np.ravel(low).tolist(), strict=True)
        return [(h << 32) + n for h, n in pairs]


def _two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the rounded sum and its exact rounding error (Knuth, TAOCP vol. 2, 4.2.2)."""
    total = a + b
    b_seen = total - a
    error = (a - (total - b_seen)) + (b - b_seen)
    # The error of an infinite sum would be inf - inf = NaN.
    return total, jnp.where(jnp.isfinite(total), error, 0)


def _exact_parts(x: jax.Array) -> list[jax.Array]:
    """Split `x` into float32 scalars whose sum equals that of `x` in any order of addition.

    All elements are cut at the same binary place. The leading slices add up without rounding, and
    so do the next ones: Rump, Ogita and Oishi, "Accurate floating-point summation, part I", 2008,
    algorithm 3.2. The remainder below three slices is small enough for a plain sum.
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
        exponent = exponent - 24  # float32 has 24 significant bits: `rest` is below them
    # Inf, NaN and values near the largest float32 cannot be sliced.
    plain = x.sum()
    is_sliced = jnp.isfinite(slices[0]) & jnp.isfinite(plain)
    below = [jnp.where(is_sliced, part, 0) for part in (*slices[1:], rest.sum())]
    return [jnp.where(is_sliced, slices[0], plain), *below]
