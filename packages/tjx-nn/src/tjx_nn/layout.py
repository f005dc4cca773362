"""Sharding hooks of a model: activations, parameters, attention, experts and token order.

A model names the dimensions of its activations and parameters ("batch", "embed", "heads", ...) and
knows no mesh. A subclass of `Layout` maps these names to a mesh; `bind(..., layout=...)` sets it.

Axes in names: B batch, T time, S keys, N query heads, K key heads, H head_dim, V value head_dim,
D d_model, R rows of a table, G groups, E experts, C capacity.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from tjx_kernels import embedding_lookup, flash_attention

# A logical name for each dimension; None for a dimension that is never sharded.
Axes = Sequence[str | None]
# The residual stream between layers and inside of a layer (sequence parallelism shards "residual").
RESIDUAL_AXES, SEQUENCE_AXES = ("batch", "residual", "embed"), ("batch", "seq", "embed")


class Layout:
    """Layout of a single device: no array is sharded. Subclass it to run a model on a mesh.

    The logical axes of activations are "batch", "seq" (tokens inside of a layer), "residual"
    (tokens of the residual stream between layers) and "embed" (features of the residual stream).

    Attributes
    ----------
    reduce_dtype : str
        Dtype in which weight gradients are summed over tokens and devices.
    token_shards : int
        Number of shards of the batch and sequence dimensions together.
    keep_logits : bool or None
        Whether the output head stores all logits, as for `tjx_kernels.linear_cross_entropy`; None:
        its default for the platform, dtype and number of devices.
    """

    reduce_dtype: str = "float32"
    token_shards: int = 1
    keep_logits: bool | None = None

    def place(self, x: Array, axes: Axes) -> Array:  # noqa: ARG002  one device: nothing to do
        """Constrain the sharding of an activation to its logical axes.

        Parameters
        ----------
        x, axes
            The activation, and a logical axis, or None, for each of its dimensions.

        Returns
        -------
        array
            `x`, with that sharding.
        """
        return x

    def all_gathered(self, w: Array, axes: Axes) -> Array:  # noqa: ARG002  as above
        """All-gather a weight over the mesh axes that only shard its storage (FSDP).

        Parameters
        ----------
        w, axes
            The weight, and a logical axis, or None, for each of its dimensions.

        Returns
        -------
        array
            The weight without the sharding of its storage.
        """
        return w

    def reduce_scattered(self, dw: Array, axes: Axes) -> Array:  # noqa: ARG002  as above
        """Reduce-scatter the gradient of a weight to the sharding of its storage.

        Parameters
        ----------
        dw, axes
            The gradient, and a logical axis, or None, for each of its dimensions.

        Returns
        -------
        array
            The sum of the gradients, sharded as the stored weight.
        """
        return dw

    def look_up(
        self,
        table: Float[Array, "R D"],
        ids: Int[Array, "*any"],
        row_axis: str,  # noqa: ARG002  as above
    ) -> Float[Array, "*any D"]:
        """Look up rows of an embedding table; ids outside of the table are clipped.

        The gradient sums the rows of equal ids in the same order on every platform.

        Parameters
        ----------
        table, ids
            Embedding table, [rows, d_model], and row numbers of any shape.
        row_axis
            Logical axis of the rows, such as "vocab".

        Returns
        -------
        array [..., d_model]
            The rows.
        """
        rows: Array = embedding_lookup(table, ids)
        return rows

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K V"],
        **options: Any,
    ) -> Float[Array, "B T N V"]:
        """Compute attention with `tjx_kernels.flash_attention` and its options.

        Parameters
        ----------
        q, k, v, **options
            As for `tjx_kernels.flash_attention`.

        Returns
        -------
        array [batch, tokens, heads, value_dim]
            Output of the attention.
        """
        out = flash_attention(q, k, v, **options)
        assert isinstance(out, Array)  # the log-sum-exp is not requested
        return out

    def to_experts(self, rows: Float[Array, "G E C D"]) -> Float[Array, "G E C D"]:
        """Dispatch rows to the devices of their experts (all-to-all).

        Parameters
        ----------
        rows
            Inputs of the experts, [groups, experts, capacity, d_model].

        Returns
        -------
        array
            The same rows, sharded over experts.
        """
        return rows

    def from_experts(self, rows: Float[Array, "G E C D"]) -> Float[Array, "G E C D"]:
        """Combine rows from the devices of their experts: the inverse of `to_experts`.

        Parameters
        ----------
        rows
            Outputs of the experts, [groups, experts, capacity, d_model].

        Returns
        -------
        array
            The same rows, sharded over groups.
        """
        return rows

    def reorder[A: Array | np.ndarray](self, x: A) -> A:
        """Permute the tokens of [batch, tokens, ...] into device order (zigzag, for example).

        Parameters
        ----------
        x
            Array or pytree with the axes [batch, tokens, ...].

        Returns
        -------
        array or pytree
            `x` with permuted tokens.
        """
        return x

    def restore(self, x: Array) -> Array:
        """Permute the tokens of [batch, tokens, ...] back: the inverse of `reorder`.

        Parameters
        ----------
        x
            Array [batch, tokens, ...] in device order.

        Returns
        -------
        array
            `x` in natural order.
        """
        return x


SINGLE_DEVICE = Layout()


class ParamSharding(NamedTuple):
    """Sharding of a weight inside of a custom derivative: a layout and the weight's logical axes.

    Attributes
    ----------
    layout
        Layout of the model.
    axes
        Logical axes of the weight.
    """

    layout: Layout
    axes: tuple[str | None, ...]

    def gather(self, w: Array, dtype: Any) -> Array:
        """Cast a weight, then all-gather it."""
        return self.layout.all_gathered(w.astype(dtype), self.axes)

    def scatter(self, dw: Array, dtype: Any) -> Array:
        """Reduce-scatter a weight gradient, then cast it."""
        return self.layout.reduce_scattered(dw, self.axes).astype(dtype)

    def sum_dtype(self, x: Array) -> Any:
        """Return the dtype in which a weight gradient is summed over tokens and devices."""
        return jnp.promote_types(x.dtype, self.layout.reduce_dtype)


class ShardedModule(nnx.Module):
    """Module whose computation depends on the layout of the model, which `bind` sets."""

    layout: Layout = SINGLE_DEVICE

    def gather(self, w: nnx.Param[Array], axes: Axes) -> Array:
        """All-gather a float32 weight; its gradient is summed over devices in float32."""
        return _gather_weight(ParamSharding(self.layout, tuple(axes)), w[...])


def make_param(value: Array, axes: Axes) -> nnx.Param[Array]:
    """Make a parameter with logical axes in flax's own metadata (`nnx.get_partition_spec`)."""
    return nnx.Param(value, out_sharding=tuple(axes), eager_sharding=False)


def set_model_layout(model: nnx.Module, layout: Layout) -> None:
    """Set the layout of every `ShardedModule` of a model."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, ShardedModule):
            module.layout = layout


def gather_sequence(layout: Layout, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """All-gather the tokens of the residual stream; the gradient is reduce-scattered."""
    return _constrain(layout, SEQUENCE_AXES, RESIDUAL_AXES, x)


def scatter_sequence(layout: Layout, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Reduce-scatter the tokens of a layer's output; the gradient is all-gathered."""
    return _constrain(layout, RESIDUAL_AXES, SEQUENCE_AXES, x)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _constrain(layout: Layout, axes: Axes, gradient_axes: Axes, x: Array) -> Array:  # noqa: ARG001
    return layout.place(x, axes)


def _constrain_forward(
    layout: Layout, axes: Axes, gradient_axes: Axes, x: Array
) -> tuple[Array, None]:
    return _constrain(layout, axes, gradient_axes, x), None


def _constrain_backward(
    layout: Layout,
    axes: Axes,  # noqa: ARG001
    gradient_axes: Axes,
    _: None,
    dx: Array,
) -> tuple[Array]:
    return (layout.place(dx, gradient_axes),)


_constrain.defvjp(_constrain_forward, _constrain_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather_weight(sharding: ParamSharding, w: Array) -> Array:
    return sharding.layout.all_gathered(w, sharding.axes)


def _gather_weight_forward(sharding: ParamSharding, w: Array) -> tuple[Array, None]:
    return _gather_weight(sharding, w), None


def _gather_weight_backward(sharding: ParamSharding, _: None, dw: Array) -> tuple[Array]:
    layout, axes = sharding
    # All-reduce first: XLA may otherwise shard the partial sums by the features of the weight.
    return (layout.reduce_scattered(layout.all_gathered(dw, axes), axes),)


_gather_weight.defvjp(_gather_weight_forward, _gather_weight_backward)
