"""`MeshLayout`: shard the activations, weights, attention and experts of a model over a mesh."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tjx_parallel.config import MeshConfig
from tjx_parallel.sharding.constraints import make_constraint
from tjx_parallel.sharding.embedding_lookup import look_up
from tjx_parallel.sharding.expert_all_to_all import expert_all_to_all
from tjx_parallel.sharding.rules import STORAGE_AXES, ShardingRules

Axes = Sequence[str | None]


class MeshLayout:
    """Sharding hooks of a model, those of `tjx_nn.Layout`, on a device mesh.

    To bind a tjx_nn model, inherit from both: ``class Sharded(MeshLayout, tjx_nn.Layout)``.

    Parameters
    ----------
    mesh
        The device mesh.
    rules
        Mapping of logical axes to mesh axes.
    choices
        ZeRO stage, context-parallel attention and the dtype of gradient reductions.
    attention
        Sharded attention, `tjx_kernels.sharded_flash_attention` or a function with its arguments.
    token_order
        (permutation of tokens [batch, tokens, ...] to `n` parts, its inverse), such as
        `tjx_kernels.zigzag` and `unzigzag`: devices along context then hold early and late
        positions, which balances the work of a causal mask. None keeps the order.
    take
        Lookup of table rows on one device, as for `look_up`.

    Attributes
    ----------
    reduce_dtype : str
        Dtype in which weight gradients are summed over devices.
    token_shards : int
        Number of shards of the batch and sequence dimensions together.
    """

    def __init__(
        self,
        mesh: Mesh,
        rules: ShardingRules,
        choices: MeshConfig,
        *,
        attention: Callable[..., jax.Array],
        token_order: tuple[Callable[..., jax.Array], Callable[..., jax.Array]] | None = None,
        take: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    ) -> None:
        self.reduce_dtype: str = choices.reduce_dtype
        axes = [rules.mesh_axes(name) for name in ("batch", "seq")]
        self.token_shards: int = math.prod(mesh.shape[axis] for each in axes for axis in each)
        self._place = make_constraint(mesh, rules)
        self._gathered = make_constraint(mesh, rules, without=STORAGE_AXES)
        self._mesh, self._rules, self._take = mesh, rules, take
        self._weights_sharded = choices.zero == 3
        self._gradients_sharded = choices.zero >= 2
        self._parts = mesh.shape["context"] if token_order else 1
        self._token_order = token_order
        self._attend = attention
        self._attention: dict[str, Any] = {
            "mesh": mesh,
            "batch_axes": rules.mesh_axes("batch"),
            "head_axes": rules.mesh_axes("heads"),
            "seq_axes": rules.mesh_axes("seq"),
            "context": choices.context_kind,
            "order": "zigzag" if self._parts > 1 else "contiguous",
        }

    def place(self, x: jax.Array, axes: Axes) -> jax.Array:
        """Constrain the sharding of an activation."""
        return self._place(x, axes)

    def all_gathered(self, w: jax.Array, axes: Axes) -> jax.Array:
        """All-gather a weight over its storage axes, in its current dtype."""
        # Constrain the sharded value first; otherwise XLA gathers the weight before the cast.
        return self._gathered(self._place(w, axes) if self._weights_sharded else w, axes)

    def reduce_scattered(self, dw: jax.Array, axes: Axes) -> jax.Array:
        """Reduce-scatter a weight gradient to the sharding of its storage."""
        return self._place(dw, axes) if self._gradients_sharded else self._gathered(dw, axes)

    def look_up(self, table: jax.Array, ids: jax.Array, row_axis: str) -> jax.Array:
        """Look up rows of a sharded embedding table."""
        return look_up(table, ids, self._mesh, self._rules, row_axis, take=self._take)

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> jax.Array:
        """Compute attention over sharded batch, heads and sequence."""
        return self._attend(q, k, v, **self._attention, **options)

    def to_experts(self, rows: jax.Array) -> jax.Array:
        """Send rows to the devices of their experts (all-to-all over expert)."""
        return rows if self._mesh.shape["expert"] == 1 else expert_all_to_all(rows, self._mesh)

    def from_experts(self, rows: jax.Array) -> jax.Array:
        """Return rows from their experts; the inverse of `to_experts`."""
        if self._mesh.shape["expert"] == 1:
            return rows
        return expert_all_to_all(rows, self._mesh, back=True)

    def reorder(self, x: Any) -> Any:
        """Permute the tokens of [batch, tokens, ...] into the order of the devices."""
        if self._token_order is None or self._parts == 1:
            return x
        whole = self._tokens(jnp.asarray(x), None)
        return self._tokens(self._token_order[0](whole, self._parts), "seq")

    def restore(self, x: jax.Array) -> jax.Array:
        """Undo `reorder`."""
        if self._token_order is None or self._parts == 1:
            return x
        return self._token_order[1](self._tokens(x, None), self._parts)

    def _tokens(self, x: jax.Array, axis: str | None) -> jax.Array:
        """Shard or replicate the token axis; permutations need it replicated."""
        batch = "batch" if x.shape[0] > 1 else None  # positions may be shared by all rows
        return self._place(x, (batch, axis, *[None] * (x.ndim - 2)))
