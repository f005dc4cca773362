"""Where the arrays of a model lie when it runs on several devices.

A model gives each dimension of what it computes with a logical name and knows of no mesh. Whoever
has one derives from `Layout` and gives it to `bind`; `Layout` itself is that of one device.

Axes in names: B batch, T time, S keys, N query heads, K key heads, H head_dim, V that of values
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from tjx_kernels import embedding_lookup, flash_attention

# A name for each dimension; None for one that is never divided.
Axes = Sequence[str | None]
Move = Callable[[Array], Array]


class Layout:
    """One device: every array is whole, and nothing is done.

    The logical axes of activations are "batch", "seq" (tokens within a layer), "residual" (tokens
    of the stream between layers) and "embed" (features of the stream).

    Attributes
    ----------
    reduce_dtype : str
        Type in which gradients of weights are summed over devices, and over the tokens of one.
    token_shards : int
        Devices that the tokens of a batch are divided over.
    """

    reduce_dtype: str = "float32"
    token_shards: int = 1

    def place(self, x: Array, axes: Axes) -> Array:  # noqa: ARG002  of no use on one device
        """Return an activation, lying as the names of its dimensions say."""
        return x

    def all_gathered(self, w: Array, axes: Axes) -> Array:  # noqa: ARG002  as above
        """Return a weight as products want it: whole where it is divided only to be kept."""
        return w

    def reduce_scattered(self, dw: Array, axes: Axes) -> Array:  # noqa: ARG002  as above
        """Return the gradient of a weight, divided as the weight is kept."""
        return dw

    def look_up(
        self,
        table: Float[Array, "R D"],
        ids: Int[Array, "*any"],
        row_axis: str,  # noqa: ARG002  as above
    ) -> Float[Array, "*any D"]:
        """Return rows of a table whose rows are named so; ids outside of it are clipped to it.

        The gradient sums the rows of equal ids in one order on every platform.
        """
        found: Array = embedding_lookup(table, ids)
        return found

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K V"],
        **options: Any,
    ) -> Float[Array, "B T N V"]:
        """Run `tjx_kernels.flash_attention` with these options."""
        out = flash_attention(q, k, v, **options)
        assert isinstance(out, Array)  # and no log-sum-exp with it
        return out

    def to_experts(self, rows: Float[Array, "G E C D"]) -> Float[Array, "G E C D"]:
        """Return rows for experts, having moved them to where these are."""
        return rows

    def from_experts(self, rows: Float[Array, "G E C D"]) -> Float[Array, "G E C D"]:
        """Undo `to_experts`."""
        return rows

    def reorder[A: Array | np.ndarray](self, x: A) -> A:
        """Return [batch, tokens, ...] with the tokens in the order in which devices hold them."""
        return x

    def restore(self, x: Array) -> Array:
        """Undo `reorder`."""
        return x

    def reordered[T](self, tree: T) -> T:
        """Return a pytree of arrays [batch, tokens, ...], each reordered."""
        ordered: T = jax.tree.map(self.reorder, tree)
        return ordered


SINGLE_DEVICE = Layout()


class ShardedModule(nnx.Module):
    """A part of a model that asks the layout; `bind` sets it."""

    layout: Layout = SINGLE_DEVICE

    def table(self, w: nnx.Param[Array], axes: Axes) -> Array:
        """Return a float32 weight as it is used, its gradient summed over devices in float32."""
        return _used(self.layout, tuple(axes), w[...])


def set_model_layout(model: nnx.Module, layout: Layout) -> None:
    """Give a layout to all parts of a model."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, ShardedModule):
            module.layout = layout


# The stream between layers, and what a layer reads of it.
RESIDUAL_AXES, SEQUENCE_AXES = ("batch", "residual", "embed"), ("batch", "seq", "embed")


def gather_sequence(layout: Layout, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Gather the tokens of the stream that a layer works on; their gradients are scattered."""
    return _moved(layout, RESIDUAL_AXES, SEQUENCE_AXES, x)


def scatter_sequence(layout: Layout, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Scatter the tokens of a layer's output over the stream; their gradients are gathered."""
    return _moved(layout, SEQUENCE_AXES, RESIDUAL_AXES, x)


def _moved(layout: Layout, here: Axes, there: Axes, x: Array) -> Array:
    return _both_ways(lambda x: layout.place(x, there), lambda dx: layout.place(dx, here), x)


def _used(layout: Layout, axes: tuple[str | None, ...], w: Array) -> Array:
    def reduce_scattered(dw: Array) -> Array:
        # Summed first: else the compiler may divide what is summed by the features of `w`.
        return layout.reduce_scattered(layout.all_gathered(dw, axes), axes)

    return _both_ways(lambda w: layout.all_gathered(w, axes), reduce_scattered, w)


def _both_ways(there: Move, back: Move, x: Array) -> Array:
    """Move an array, and its gradient in a way of its own."""

    @jax.custom_vjp
    def move(x: Array) -> Array:
        return there(x)

    def forward(x: Array) -> tuple[Array, None]:
        return there(x), None

    def backward(_: None, dx: Array) -> tuple[Array]:
        return (back(dx),)

    move.defvjp(forward, backward)
    moved: Array = move(x)
    return moved
