"""The linear layer and the table of vectors, with their initial values and logical axes.

Axes in names: B batch, T time, D d_model.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal
from jaxtyping import Array, Float, Int

from tjx_nn.config import TransformerConfig
from tjx_nn.layers.float8 import float8_matmul
from tjx_nn.layers.matmul import ParamSharding, add_bias, matmul
from tjx_nn.layout import ShardedModule


class Linear(ShardedModule):
    """A matrix product, and a bias if there is one; float32 parameters.

    Parameters
    ----------
    shape
        Features of input and output.
    axes
        Logical names of the kernel's axes.
    dtype
        Type of the computation.
    std
        Standard deviation of the kernel's initial values.
    use_bias
        Whether there is a bias; it begins at 0.
    rngs
        Source of the initial values.
    float8
        Whether the product is one of 8-bit floats.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        axes: tuple[str | None, str | None],
        dtype: str,
        std: float,
        use_bias: bool,
        rngs: nnx.Rngs,
        float8: bool = False,
    ) -> None:
        self.axes, self.dtype, self.float8 = axes, dtype, float8
        kernel = normal(std)(rngs.params(), shape, jnp.float32)
        self.kernel = nnx.Param(kernel, logical_axes=axes)
        zeros = jnp.zeros(shape[1], jnp.float32)
        self.bias = nnx.Param(zeros, logical_axes=axes[1:]) if use_bias else None

    def __call__(self, x: Float[Array, "*any I"]) -> Float[Array, "*any O"]:
        """Return the product, in the type of the computation."""
        x = x.astype(self.dtype)
        multiply = float8_matmul if self.float8 else matmul
        y: Array = multiply(ParamSharding(self.layout, self.axes), x, self.kernel[...])
        if self.bias is not None:
            y = add_bias(ParamSharding(self.layout, self.axes[1:]), y, self.bias[...])
        return y


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
    """Return a linear layer of the model.

    Parameters
    ----------
    config
        The model.
    axes
        Logical names of the kernel's axes, input and output; None for one that is never divided.
    shape
        Features of input and output.
    rngs
        Source of the initial values.
    residual
        Whether the output is added to the residual stream.
    bias
        Whether there is a bias; None asks the configuration.
    float8
        Whether the product may be one of 8-bit floats, if the configuration has these.
    """
    # Only what goes from width to width is scaled with it: other axes do not grow.
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
    """Return the standard deviation of a kernel's initial values.

    What writes to the residual stream is scaled down, as 2 * n_layer sublayers add up there
    (GPT-2). Under muP the variance goes with 1 / width (Yang et al. 2022, table 8).
    """
    std = config.init_std / math.sqrt(config.width_multiplier)
    return std / math.sqrt(2 * config.n_layer) if residual else std


class Embedding(ShardedModule):
    """A table of vectors, looked up by id.

    The lookup is in float32, so that gradients of frequent ids add up in float32. Ids outside the
    table are clipped to it.
    """

    def __init__(
        self, num: int, features: int, *, axes: tuple[str, str], std: float, rngs: nnx.Rngs
    ) -> None:
        table = normal(std)(rngs.params(), (num, features), jnp.float32)
        self.axes = axes
        self.embedding = nnx.Param(table, logical_axes=axes)

    @jax.named_scope("embedding")  # as profiles and plans name it
    def __call__(
        self, ids: Int[Array, "*any"], rows: Float[Array, "rows D"] | None = None
    ) -> Float[Array, "*any D"]:
        """Return the rows of `ids`; `rows()` may be given, where it has other uses too."""
        return self.layout.look_up(self.rows() if rows is None else rows, ids, self.axes[0])

    def rows(self) -> Float[Array, "rows D"]:
        """Return all rows, their features gathered where they are spread over devices."""
        return self.table(self.embedding, self.axes)
