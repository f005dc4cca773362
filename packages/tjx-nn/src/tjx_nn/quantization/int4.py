"""Int4 weights of linear layers: groups of inputs share a scale and a zero point for each output.

The zero point is an integer, as in GPTQ (Frantar et al. 2022) and AWQ (Lin et al. 2023), so that
their checkpoints have this form too. CPUs multiply few rows in int8, group by group, with inputs in
two parts as for int8 weights; otherwise the weight is converted to the dtype of the input.

Axes in names: I input features, J half of them, G groups, O output features.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Float32, Int8, UInt8

from tjx_nn.layout import ParamSharding
from tjx_nn.quantization.int8 import join_products, split_input

# Largest group that `quantize_int4` makes, as most GPTQ and AWQ checkpoints have.
GROUP = 128
_MAX = 15
# Fractions of a group's range that the search for its scale tries: a smaller range clips the
# outermost weights and rounds the others more finely.
_FRACTIONS = tuple(1 - step / 40 for step in range(11))
# Most rows of an input that are multiplied in int8 on a CPU.
_FEW_ROWS = 8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int4Kernel:
    """Kernel ``(values - zero) * scale`` of a linear layer, in the place of an array.

    As a node of a pytree it can also hold shapes, shardings or logical axes.

    Attributes
    ----------
    values : uint8 [*layers, I / 2, O]
        Values from 0 to 15, two in a byte: the lower halves of the bytes of a group are the first
        half of its inputs, the upper halves the second.
    scale : float32 [*layers, groups, O]
        Scale of each group and output.
    zero : uint8 [*layers, groups, O]
        Zero point of each group and output, from 0 to 16.
    """

    values: Any
    scale: Any
    zero: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        *layers, half, outputs = self.values.shape
        return (*layers, 2 * half, outputs)

    @property
    def dtype(self) -> Any:
        """Dtype of the kernel that this one represents."""
        return self.scale.dtype

    def __getitem__(self, index: Any) -> "Int4Kernel":
        """Index the leading axes, as layers are."""
        return Int4Kernel(self.values[index], self.scale[index], self.zero[index])

    def astype(self, dtype: Any) -> Float[Array, "*layers I O"]:
        """Return the kernel as an array.

        Parameters
        ----------
        dtype
            Dtype of the array.

        Returns
        -------
        array [*layers, I, O]
            ``(values - zero) * scale``.
        """
        groups = self._steps().astype(jnp.float32) * self.scale[..., None, :]
        kernel: Array = groups.reshape(self.shape).astype(dtype)
        return kernel

    def gathered(self, sharding: ParamSharding) -> "Int4Kernel":
        """All-gather the kernel of a single layer.

        Parameters
        ----------
        sharding
            Layout and logical axes of the kernel.

        Returns
        -------
        Int4Kernel
            The whole kernel on each device.
        """
        layout, axes = sharding
        kernel: Int4Kernel = jax.tree.map(layout.all_gathered, self, int4_axes(axes))
        return kernel

    def product(self, x: Float[Array, "*any I"]) -> Float32[Array, "*any O"]:
        """Multiply inputs with the kernel of a single layer.

        Parameters
        ----------
        x
            Inputs [*any, I].

        Returns
        -------
        float32 array [*any, O]
            The product over the last axis of `x`.
        """
        y: Array = jax.lax.platform_dependent(
            x, self, cpu=_few_rows if math.prod(x.shape[:-1]) <= _FEW_ROWS else _dense,
            default=_dense,
        )  # fmt: skip
        return y

    def _steps(self) -> Int8[Array, "*layers groups group O"]:
        """Return the weights in units of their scales, from -16 to 15."""
        values = rearrange(self.values, "... (g j) o -> ... g j o", g=self.scale.shape[-2])
        nibbles = jnp.concatenate([values & _MAX, values >> 4], -2).astype(jnp.int8)
        steps: Array = nibbles - self.zero[..., None, :].astype(jnp.int8)
        return steps


def quantize_int4(w: Float[Array, "*layers I O"]) -> Int4Kernel:
    """Round a kernel to the nearest of 16 values in each group of inputs, for each output.

    A group has the largest even divisor of the inputs up to `GROUP`. Its values span its range of
    weights, 0 included, or the fraction of it that leaves the least squared error.

    Raises
    ------
    ValueError
        If the number of inputs is odd.
    """
    *layers, inputs, outputs = w.shape
    size = max((n for n in range(2, GROUP + 1, 2) if inputs % n == 0), default=None)
    if size is None:
        raise ValueError(
            f"kernel: got {inputs} inputs; expected an even number for int4, as two values share a "
            "byte; quantize to int8"
        )
    groups = w.astype(jnp.float32).reshape(*layers, inputs // size, size, outputs)
    low, high = jnp.minimum(groups.min(-2), 0), jnp.maximum(groups.max(-2), 0)

    whole = jnp.where(high > low, (high - low) / _MAX, 1.0)
    zero = jnp.round(-low / whole)

    def rounded(scale: Array) -> Array:
        steps = jnp.round(groups / scale[..., None, :]) + zero[..., None, :]
        return jnp.clip(steps, 0, _MAX)

    def error(fraction: Array) -> Array:
        scale = (fraction * whole)[..., None, :]
        found = (rounded(scale[..., 0, :]) - zero[..., None, :]) * scale
        return jnp.square(found - groups).sum(-2)

    fractions = jnp.asarray(_FRACTIONS, jnp.float32)
    scale = whole * fractions[jax.lax.map(error, fractions).argmin(0)]
    packed = pack(rounded(scale).astype(jnp.uint8)).reshape(*layers, inputs // 2, outputs)
    return Int4Kernel(packed, scale, zero.astype(jnp.uint8))


def pack(
    values: UInt8[Array | np.ndarray, "*layers groups group O"],
) -> UInt8[Array | np.ndarray, "*layers groups half O"]:
    """Pack the values of each group into bytes, as in `Int4Kernel.values`."""
    half = values.shape[-2] // 2
    return values[..., :half, :] | values[..., half:, :] << 4


def int4_axes(axes: tuple[str | None, ...]) -> Int4Kernel:
    """Return the logical axes of the arrays of a kernel from those of the kernel.

    Groups are not sharded: their number need not be a multiple of the devices.
    """
    of_groups = (*axes[:-2], None, axes[-1])
    return Int4Kernel(axes, of_groups, of_groups)


def _dense(x: Array, w: Int4Kernel) -> Float32[Array, "*any O"]:
    y: Array = jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32)
    return y


def _few_rows(x: Array, w: Int4Kernel) -> Float32[Array, "*any O"]:
    parts, unit = split_input(x)
    parts = rearrange(parts, "p ... (g i) -> g p ... i", g=w.scale.shape[0])
    y = jnp.einsum("gp...i,gio->gp...o", parts, w._steps(), preferred_element_type=jnp.int32)
    y = (y.astype(jnp.float32) * rearrange(w.scale, f"g o -> g {'1 ' * x.ndim}o")).sum(0)
    return join_products(y, unit)
