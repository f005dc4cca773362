"""Int8 weights of linear layers: one scale for each output, and products with inputs.

CPUs multiply two int8 products instead of converting the weight: an input is the sum of two int8
parts, together 15 bits of its row's largest magnitude, and int32 sums are exact. Other devices
convert the weight to the dtype of the input inside of the product.

Axes in names: I input features, O output features.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8

from tjx_nn.layout import ParamSharding

_MAX = 127.0
# Steps of the second part of an input in one step of the first.
_FINE_STEPS = 2 * _MAX


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Kernel:
    """Kernel ``values * scale`` of a linear layer, possibly stacked, in the place of an array.

    As a node of a pytree it can also hold shapes, shardings or logical axes.

    Attributes
    ----------
    values : int8 [*layers, I, O]
        Rounded weights in units of `scale`.
    scale : float32 [*layers, O]
        Scale of each output.
    """

    values: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        shape: tuple[int, ...] = self.values.shape
        return shape

    @property
    def dtype(self) -> Any:
        """Dtype of the kernel that this one represents."""
        return self.scale.dtype

    def __getitem__(self, index: Any) -> "Int8Kernel":
        """Index the leading axes, as layers are."""
        return Int8Kernel(self.values[index], self.scale[index])

    def astype(self, dtype: Any) -> Float[Array, "*layers I O"]:
        """Return the kernel as an array.

        Parameters
        ----------
        dtype
            Dtype of the array.

        Returns
        -------
        array [*layers, I, O]
            ``values * scale``.
        """
        kernel: Array = (self.values * self.scale[..., None, :]).astype(dtype)
        return kernel

    def gathered(self, sharding: ParamSharding) -> "Int8Kernel":
        """All-gather the kernel of a single layer.

        Parameters
        ----------
        sharding
            Layout and logical axes of the kernel.

        Returns
        -------
        Int8Kernel
            The whole kernel on each device.
        """
        layout, axes = sharding
        return Int8Kernel(
            layout.all_gathered(self.values, axes), layout.all_gathered(self.scale, axes[1:])
        )

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
        y: Array = jax.lax.platform_dependent(x, self, cpu=_two_products, default=_one_product)
        return y


def quantize_int8(w: Float[Array, "*layers I O"]) -> Int8Kernel:
    """Round a kernel to the nearest of 255 multiples of each output's largest weight / 127."""
    w = w.astype(jnp.float32)
    largest = jnp.abs(w).max(-2)
    scale = jnp.where(largest > 0, largest / _MAX, 1.0)
    return Int8Kernel(jnp.round(w / scale[..., None, :]).astype(jnp.int8), scale)


def int8_axes(axes: tuple[str | None, ...]) -> Int8Kernel:
    """Return the logical axes of the arrays of a kernel from those of the kernel."""
    return Int8Kernel(axes, (*axes[:-2], axes[-1]))


def split_input(
    x: Float[Array, "*any I"],
) -> tuple[Int8[Array, "2 *any I"], Float32[Array, "*any 1"]]:
    """Split an input into two int8 parts and the unit of each row, for `join_products`."""
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(-1, keepdims=True)
    unit = jnp.where(largest > 0, largest / _MAX, 1.0)
    steps = x / unit
    coarse = jnp.round(steps)
    fine = jnp.round((steps - coarse) * _FINE_STEPS)
    return jnp.stack([coarse, fine]).astype(jnp.int8), unit


def join_products(
    y: Float32[Array, "2 *any O"], unit: Float32[Array, "*any 1"]
) -> Float32[Array, "*any O"]:
    """Return the product of an input from those of its two parts."""
    return (y[0] + y[1] / _FINE_STEPS) * unit


def _one_product(x: Array, w: Int8Kernel) -> Float32[Array, "*any O"]:
    y = jnp.matmul(x, w.values.astype(x.dtype), preferred_element_type=jnp.float32)
    return y * _per_output(w.scale, y)


def _two_products(x: Array, w: Int8Kernel) -> Float32[Array, "*any O"]:
    parts, unit = split_input(x)
    y = jnp.matmul(parts, w.values, preferred_element_type=jnp.int32).astype(jnp.float32)
    y = join_products(y, unit)
    return y * _per_output(w.scale, y)


def _per_output(scale: Array, y: Array) -> Array:
    return scale[(None,) * (y.ndim - 1)]
