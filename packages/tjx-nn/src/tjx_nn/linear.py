"""The linear layer and the table of vectors, with their initial values and logical axes.

Axes in names: B batch, T time, D d_model.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal
from jaxtyping import Array, Float, Int

from tjx_nn.config import TransformerConfig
from tjx_nn.matmul import dot_general

# constrain(x, logical names of its axes) -> x: how a caller says where on its mesh x lies.
Constrain = Callable[[jax.Array, Sequence[str | None]], jax.Array]


def place(x: Float[Array, "B T D"], constrain: Constrain | None) -> Float[Array, "B T D"]:
    """Say where the residual stream lies, where the model runs on several devices."""
    return x if constrain is None else constrain(x, ("batch", "seq", "embed"))


def linear(
    config: TransformerConfig,
    axes: tuple[str | None, str | None],
    shape: tuple[int, int],
    *,
    rngs: nnx.Rngs,
    residual: bool = False,
    bias: bool | None = None,
) -> nnx.Linear:
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
    """
    # Only what goes from width to width is scaled with it: other axes do not grow.
    std = config.init_std if None in axes else initial_std(config, residual=residual)
    return nnx.Linear(
        *shape,
        use_bias=config.bias if bias is None else bias,
        dtype=config.dtype,
        param_dtype=jnp.float32,
        kernel_init=normal(std),
        dot_general=dot_general,
        kernel_metadata={"logical_axes": axes},
        bias_metadata={"logical_axes": axes[1:]},
        rngs=rngs,
    )


def initial_std(config: TransformerConfig, *, residual: bool) -> float:
    """Return the standard deviation of a kernel's initial values.

    What writes to the residual stream is scaled down, as 2 * n_layer sublayers add up there
    (GPT-2). Under muP the variance goes with 1 / width (Yang et al. 2022, table 8).
    """
    std = config.init_std / math.sqrt(config.width_multiplier)
    return std / math.sqrt(2 * config.n_layer) if residual else std


class Embedding(nnx.Module):
    """A table of vectors, looked up by id.

    The lookup is in float32, so that gradients of frequent ids add up in float32. Ids outside the
    table are clipped to it.
    """

    def __init__(
        self, num: int, features: int, *, axes: tuple[str, str], std: float, rngs: nnx.Rngs
    ) -> None:
        table = normal(std)(rngs.params(), (num, features), jnp.float32)
        self.row_axis = axes[0]
        self.embedding = nnx.Param(table, logical_axes=axes)

    def __call__(
        self, ids: Int[Array, "*any"], *, constrain: Constrain | None = None
    ) -> Float[Array, "*any D"]:
        """Return the rows of `ids`."""
        return jnp.take(self.table(constrain), ids, axis=0, mode="clip")

    def table(self, constrain: Constrain | None = None) -> Float[Array, "rows D"]:
        """Return all rows, their features gathered where they are spread over devices."""
        table = self.embedding[...]
        return table if constrain is None else constrain(table, (self.row_axis, None))
