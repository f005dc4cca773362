"""`MeshLayout`: shard a tjx_nn model over a device mesh with tjx_parallel and tjx_kernels."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tjx_kernels
import tjx_nn
import tjx_parallel
from tjx_kernels.sharded.ring_schedule import unzigzag, zigzag
from tjx_nn.layout import SINGLE_DEVICE, Axes
from tjx_trainer.config.run_config import ModelConfig, built_in_family


class MeshLayout(tjx_nn.Layout):
    """Shard activations, weights, attention and experts over a mesh.

    Parameters
    ----------
    mesh : jax.sharding.Mesh
        The device mesh.
    rules : tjx_parallel.ShardingRules
        Mapping of logical axes to mesh axes.
    choices : tjx_parallel.MeshConfig
        ZeRO stage, context-parallel attention and the dtype of gradient reductions.
    zigzag : bool
        Whether devices along context hold early and late positions, which balances the work of a
        causal mask.
    """

    def __init__(
        self,
        mesh: jax.sharding.Mesh,
        rules: tjx_parallel.ShardingRules,
        choices: tjx_parallel.MeshConfig,
        *,
        zigzag: bool,
    ) -> None:
        self.reduce_dtype = choices.reduce_dtype
        self._place = tjx_parallel.make_constraint(mesh, rules)
        self._gathered = tjx_parallel.make_constraint(
            mesh, rules, without=tjx_parallel.STORAGE_AXES
        )
        self._mesh, self._rules = mesh, rules
        # XLA's gradient of a gather is a scatter with atomics on GPUs.
        on_gpus = mesh.devices.flat[0].platform not in ("cpu", "tpu")
        self._take = tjx_kernels.embedding_lookup if on_gpus else None
        axes = [rules.mesh_axes(name) for name in ("batch", "seq")]
        self.token_shards = math.prod(mesh.shape[axis] for each in axes for axis in each)
        self._weights_sharded = choices.zero == 3
        self._gradients_sharded = choices.zero >= 2
        self._parts = mesh.shape["context"] if zigzag else 1
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
        found: jax.Array = tjx_parallel.look_up(
            table, ids, self._mesh, self._rules, row_axis, take=self._take
        )
        return found

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> jax.Array:
        """Compute attention over sharded batch, heads and sequence."""
        out: jax.Array = tjx_kernels.sharded_flash_attention(q, k, v, **self._attention, **options)
        return out

    def to_experts(self, rows: jax.Array) -> jax.Array:
        """Send rows to the devices of their experts (all-to-all over expert)."""
        if self._mesh.shape["expert"] == 1:
            return rows
        moved: jax.Array = tjx_parallel.expert_all_to_all(rows, self._mesh)
        return moved

    def from_experts(self, rows: jax.Array) -> jax.Array:
        """Return rows from their experts; the inverse of `to_experts`."""
        if self._mesh.shape["expert"] == 1:
            return rows
        moved: jax.Array = tjx_parallel.expert_all_to_all(rows, self._mesh, back=True)
        return moved

    def reorder[A: jax.Array | np.ndarray](self, x: A) -> A:
        """Permute tokens into zigzag order."""
        if self._parts == 1:
            return x
        whole = self._tokens(jnp.asarray(x), None)
        ordered: A = self._tokens(zigzag(whole, self._parts), "seq")
        return ordered

    def restore(self, x: jax.Array) -> jax.Array:
        """Undo `reorder`."""
        if self._parts == 1:
            return x
        restored: jax.Array = unzigzag(self._tokens(x, None), self._parts)
        return restored

    def _tokens(self, x: Any, axis: str | None) -> Any:
        """Shard or replicate the token axis; permutations need it replicated."""
        batch = "batch" if x.shape[0] > 1 else None  # positions may be shared by all rows
        return self._place(x, (batch, axis, *[None] * (x.ndim - 2)))


def make_layout(
    model: ModelConfig,
    mesh: jax.sharding.Mesh,
    rules: tjx_parallel.ShardingRules,
    choices: tjx_parallel.MeshConfig,
) -> tjx_nn.Layout:
    """Return the layout of a model on a mesh; `SINGLE_DEVICE` for a mesh of one device."""
    if mesh.size == 1:
        return SINGLE_DEVICE
    causal = built_in_family(model) in ("gpt", "encoder_decoder")
    return MeshLayout(mesh, rules, choices, zigzag=causal and choices.context_kind == "ring")
