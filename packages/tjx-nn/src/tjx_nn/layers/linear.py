"""Linear layer: initialization, logical axes, and a matrix product with sharded weights.

The weight is cast and all-gathered in the forward pass and again in the backward pass; neither
copy is a residual. Its gradient is summed in float32 (or `Layout.reduce_dtype`) over the tokens of
all devices. Derivatives are reverse mode only.

Axes in names: I input features, O output features.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal
from jaxtyping import Array, Float

from tjx_nn.layers.float8 import float8_matmul
from tjx_nn.layout import ParamSharding, ShardedModule, make_param
from tjx_nn.quantization.kernels import QuantizedKernel, quantized_matmul


class Linear(ShardedModule):
    """Linear layer with float32 parameters: ``x @ kernel + bias``.

    Parameters
    ----------
    shape
        Number of input and output features.
    axes
        Logical axes of the kernel; None for an axis that is never sharded.
    dtype
        Dtype of the computation and of the output.
    std
        Standard deviation of the normal initializer of the kernel; the bias starts at 0.
    use_bias
        Whether to add a bias.
    rngs
        Source of random initial values.
    float8
        Whether to multiply in 8-bit floats (see `float8_matmul`).

    Examples
    --------
    >>> from tjx_nn import Linear
    >>> layer = Linear((8, 4), rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 8))).shape
    (2, 4)
    """

    # A `tjx_nn.lora.adapter.Adapter`, set by `tjx_nn.lora.bind`: (x, output, kernel) -> output.
    adapter: Callable[[Array, Array, Array], Array] | None = None

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        axes: tuple[str | None, str | None] = (None, None),
        dtype: str = "float32",
        std: float = 0.02,
        use_bias: bool = True,
        rngs: nnx.Rngs,
        float8: bool = False,
    ) -> None:
        self.axes, self.dtype, self.float8 = axes, dtype, float8
        self.kernel = make_param(normal(std)(rngs.params(), shape, jnp.float32), axes)
        self.bias = make_param(jnp.zeros(shape[1], jnp.float32), axes[1:]) if use_bias else None

    def __call__(self, x: Float[Array, "*any I"]) -> Float[Array, "*any O"]:
        """Apply the layer to the last axis of `x`; the output has the layer's dtype."""
        x = x.astype(self.dtype)
        kernel: Any = self.kernel[...]
        multiply = float8_matmul if self.float8 else matmul
        multiply = quantized_matmul if isinstance(kernel, QuantizedKernel) else multiply
        y: Array = multiply(ParamSharding(self.layout, self.axes), x, kernel)
        if self.adapter is not None:
            y = self.adapter(x, y, kernel)
        if self.bias is not None:
            y = add_bias(ParamSharding(self.layout, self.axes[1:]), y, self.bias[...])
        return y


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def matmul(
    sharding: ParamSharding, x: Float[Array, "*any I"], w: Float[Array, "I O"]
) -> Float[Array, "*any O"]:
    """Multiply the last axis of `x` with the first axis of a sharded weight, in the dtype of `x`.

    XLA for CPUs multiplies at half speed if the large operand is the transposed one, and fuses
    transposed copies into the producer of an operand. On CPUs the weight gradient is therefore
    computed in the orientation that transposes fewer elements, behind an optimization barrier.
    """
    return x @ sharding.gather(w, x.dtype)


def _matmul_forward(
    sharding: ParamSharding, x: Array, w: Array
) -> tuple[Array, tuple[Array, Array]]:
    return x @ sharding.gather(w, x.dtype), (x, w)


def _matmul_backward(
    sharding: ParamSharding, residuals: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, w = residuals
    dtype = sharding.sum_dtype(x)
    dw: Array = jax.lax.platform_dependent(
        x, dy, cpu=partial(_weight_gradient_cpu, dtype), default=partial(_weight_gradient, dtype)
    )
    return dy @ sharding.gather(w, x.dtype).T, sharding.scatter(dw, w.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


def _weight_gradient(dtype: Any, x: Array, dy: Array) -> Array:
    rows = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(x, dy, ((rows, rows), ((), ())), preferred_element_type=dtype)


def _weight_gradient_cpu(dtype: Any, x: Array, dy: Array) -> Array:
    x, dy = _materialize(x), _materialize(dy)
    if x.size <= dy.size + x.shape[-1] * dy.shape[-1]:  # transpose x, or dy and the result
        return _weight_gradient(dtype, x, dy)
    return _materialize(_weight_gradient(dtype, dy, x)).T


def _materialize(x: Array) -> Array:
    y: Array = jax.lax.optimization_barrier(x)  # type: ignore[no-untyped-call]  # as jax is
    return y


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def add_bias(
    sharding: ParamSharding, y: Float[Array, "*any O"], b: Float[Array, " O"]
) -> Float[Array, "*any O"]:
    """Add a sharded bias to the last axis, in the dtype of `y`."""
    return y + sharding.gather(b, y.dtype)[(None,) * (y.ndim - 1)]


def _add_bias_forward(sharding: ParamSharding, y: Array, b: Array) -> tuple[Array, Array]:
    return add_bias(sharding, y, b), b


def _add_bias_backward(sharding: ParamSharding, b: Array, dy: Array) -> tuple[Array, Array]:
    db = dy.sum(tuple(range(dy.ndim - 1)), dtype=sharding.sum_dtype(dy))
    return dy, sharding.scatter(db, b.dtype)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)
