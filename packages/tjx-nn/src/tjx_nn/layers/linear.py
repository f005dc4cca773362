"""Linear layer: initialization, logical axes, and a matrix product with sharded weights.

The weight is cast and all-gathered in the forward pass and again in the backward pass; neither
copy is a residual. Its gradient is summed in float32 (or `Layout.reduce_dtype`) over the tokens of
all devices. Derivatives are reverse mode only.

Axes in names: I input features, O output features, R rank.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal
from jaxtyping import Array, Float

from tjx_nn.config import TransformerConfig
from tjx_nn.layers.float8 import float8_matmul
from tjx_nn.layout import Layout, ParamSharding, ShardedModule, make_param


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

    # Set by `tjx_nn.lora.bind`.
    adapter: "Adapter | None" = None

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
        multiply = float8_matmul if self.float8 else matmul
        y: Array = multiply(ParamSharding(self.layout, self.axes), x, self.kernel[...])
        if self.adapter is not None:
            y = self.adapter(x, y, self.kernel[...])
        if self.bias is not None:
            y = add_bias(ParamSharding(self.layout, self.axes[1:]), y, self.bias[...])
        return y


class Adapter(ShardedModule):
    """Low-rank adapter of a linear layer: LoRA, with a magnitude DoRA.

    Hu et al. 2021, "LoRA"; Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation".

    Parameters
    ----------
    a, b
        Factors of the change of the kernel.
    magnitude
        Norm of the kernel of each output; None is LoRA.
    scale
        Factor of the change.
    axes
        Logical axes of the kernel.
    layout
        Layout of the model.
    """

    def __init__(
        self,
        a: Float[Array, "*layers I R"],
        b: Float[Array, "*layers R O"],
        magnitude: Float[Array, "*layers O"] | None = None,
        *,
        scale: float,
        axes: tuple[str | None, str | None],
        layout: Layout,
    ) -> None:
        self.a, self.b = nnx.Param(a), nnx.Param(b)
        self.magnitude = None if magnitude is None else nnx.Param(magnitude)
        self.scale, self.axes, self.layout = scale, axes, layout

    def __call__(
        self, x: Float[Array, "*any I"], y: Float[Array, "*any O"], kernel: Float[Array, "I O"]
    ) -> Float[Array, "*any O"]:
        """Adapt the output `y` of a layer without its bias.

        The norm of DoRA is a constant in the derivative, as in the paper (section 4.3).
        """
        a, b = self.a[...], self.b[...]
        low = matmul(ParamSharding(self.layout, (self.axes[0], None)), x, a)
        y = y + self.scale * matmul(ParamSharding(self.layout, (None, self.axes[1])), low, b)
        if self.magnitude is None:
            return y
        adapted = kernel.astype(jnp.float32) + self.scale * jnp.matmul(a, b, precision="highest")
        factor: Array = self.magnitude[...] / jax.lax.stop_gradient(column_norms(adapted))
        return y * factor.astype(y.dtype)[(None,) * (y.ndim - 1)]


def column_norms(kernel: Float[Array, "*layers I O"]) -> Float[Array, "*layers O"]:
    """Return the norm of the weights of each output, float32."""
    norms: Array = jnp.linalg.norm(jnp.asarray(kernel, jnp.float32), axis=-2)
    return norms


def linear(
    config: TransformerConfig,
    axes: tuple[str | None, str | None],
    shape: tuple[int, int],
    *,
    rngs: nnx.Rngs,
    residual: bool = False,
    bias: bool | None = None,
    float8: bool = True,
) -> Linear:
    """Make a `Linear` with the dtype, bias and initializer of a model.

    Parameters
    ----------
    config
        Configuration of the model.
    axes
        Logical axes of the kernel, input and output; None for an axis that is never sharded.
    shape
        Number of input and output features.
    rngs
        Source of random initial values.
    residual
        Whether the output is added to the residual stream, which scales down the initial values.
    bias
        Whether to add a bias; None is `config.bias`.
    float8
        Whether the layer follows `config.float8`; otherwise it never uses 8-bit floats.
    """
    # muP scales only kernels whose two axes both grow with the width.
    std = config.init_std if None in axes else initial_std(config, residual=residual)
    return Linear(
        shape,
        axes=axes,
        dtype=config.dtype,
        std=std,
        use_bias=config.bias if bias is None else bias,
        rngs=rngs,
        float8=config.float8 and float8,
    )


def initial_std(config: TransformerConfig, *, residual: bool) -> float:
    """Return the standard deviation of the initializer of a kernel.

    Kernels that write to the residual stream are divided by sqrt(2 * n_layer), the square root of
    the number of sublayers (GPT-2). With muP the variance is proportional to 1 / width (Yang et al.
    2022, table 8).
    """
    std = config.init_std / math.sqrt(config.width_multiplier)
    return std / math.sqrt(2 * config.n_layer) if residual else std


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def matmul(
    sharding: ParamSharding, x: Float[Array, "*any I"], w: Float[Array, "I O"]
) -> Float[Array, "*any O"]:
    """Multiply the last axis of `x` with the first axis of a sharded weight, in the dtype of `x`.

    XLA for CPUs multiplies at half speed if the large operand is the transposed one, and fuses
    transposed copies into the producer of an operand. On CPUs the weight gradient therefore
    transposes the narrower operand, behind an optimization barrier.
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
        x,
        dy,
        cpu=partial(_weight_gradient_cpu, dtype),
        default=partial(_weight_gradient, dtype),
    )
    return dy @ sharding.gather(w, x.dtype).T, sharding.scatter(dw, w.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


def _weight_gradient(dtype: Any, x: Array, dy: Array) -> Array:
    rows = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(x, dy, ((rows, rows), ((), ())), preferred_element_type=dtype)


def _weight_gradient_cpu(dtype: Any, x: Array, dy: Array) -> Array:
    x, dy = _materialize(x), _materialize(dy)
    if x.shape[-1] <= dy.shape[-1]:
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
