"""Int8 weights of linear layers: one scale for each output, and products with inputs.

CPUs multiply two int8 products instead of converting the weight: an input is the sum of two int8
parts, together 15 bits of its row's largest magnitude, and int32 sums are exact. Other devices
convert the weight to the dtype of the input inside of the product.

Axes in names: I input features, O output features.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

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


def is_int8(node: Any) -> bool:
    """Return whether a node of a tree is an int8 kernel; for ``is_leaf=``."""
    return isinstance(node, Int8Kernel)


def quantize_kernel(w: Float[Array, "*layers I O"]) -> Int8Kernel:
    """Round a kernel to the nearest of 255 multiples of each output's largest weight / 127."""
    w = w.astype(jnp.float32)
    largest = jnp.abs(w).max(-2)
    scale = jnp.where(largest > 0, largest / _MAX, 1.0)
    return Int8Kernel(jnp.round(w / scale[..., None, :]).astype(jnp.int8), scale)


def dequantize(params: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters with float32 arrays in place of int8 kernels.

    Parameters
    ----------
    params
        Parameters from `tjx_nn.quantize`.

    Returns
    -------
    dict
        Parameters as from `tjx_nn.init`.

    Examples
    --------
    >>> import jax
    >>> from tjx_nn import GPTConfig, dequantize, init, quantize
    >>> config = GPTConfig(vocab_size=11, max_seq_len=8, n_layer=2, n_head=2, d_model=4)
    >>> params = dequantize(quantize(config, init(config, jax.random.key(0))))
    >>> params["blocks"]["mlp"]["up"]["kernel"].dtype
    dtype('float32')
    """
    dense: dict[str, Any] = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if isinstance(leaf, Int8Kernel) else leaf,
        params,
        is_leaf=is_int8,
    )
    return dense


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def int8_matmul(
    sharding: ParamSharding, x: Float[Array, "*any I"], w: Int8Kernel
) -> Float[Array, "*any O"]:
    """Multiply with an int8 kernel, which has no gradient; otherwise as `linear.matmul`.

    Parameters
    ----------
    sharding
        Sharding of the weight.
    x
        Input; the result has its dtype.
    w
        Kernel of a single layer.
    """
    w = _gathered(sharding, w)
    y: Array = jax.lax.platform_dependent(x, w, cpu=_two_products, default=_one_product)
    return y.astype(x.dtype)


def _forward(sharding: ParamSharding, x: Array, w: Int8Kernel) -> tuple[Array, Int8Kernel]:
    return int8_matmul(sharding, x, w), w


def _backward(sharding: ParamSharding, w: Int8Kernel, dy: Array) -> tuple[Array, None]:
    return dy @ _gathered(sharding, w).astype(dy.dtype).T, None


int8_matmul.defvjp(_forward, _backward)


def _gathered(sharding: ParamSharding, w: Int8Kernel) -> Int8Kernel:
    layout, axes = sharding
    return Int8Kernel(layout.all_gathered(w.values, axes), layout.all_gathered(w.scale, axes[1:]))


def _one_product(x: Array, w: Int8Kernel) -> Float32[Array, "*any O"]:
    y = jnp.matmul(x, w.values.astype(x.dtype), preferred_element_type=jnp.float32)
    return y * _per_output(w.scale, y)


def _two_products(x: Array, w: Int8Kernel) -> Float32[Array, "*any O"]:
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(-1, keepdims=True)
    unit = jnp.where(largest > 0, largest / _MAX, 1.0)
    steps = x / unit
    coarse = jnp.round(steps)
    fine = jnp.round((steps - coarse) * _FINE_STEPS)
    y = jnp.matmul(
        jnp.stack([coarse, fine]).astype(jnp.int8), w.values, preferred_element_type=jnp.int32
    ).astype(jnp.float32)
    y = (y[0] + y[1] / _FINE_STEPS) * unit
    return y * _per_output(w.scale, y)


def _per_output(scale: Array, y: Array) -> Array:
    return scale[(None,) * (y.ndim - 1)]
