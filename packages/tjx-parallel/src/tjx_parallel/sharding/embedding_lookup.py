"""Embedding lookup in a table whose rows may be sharded (vocabulary parallelism)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from tjx_parallel.sharding.rules import ShardingRules


def look_up(
    table: jax.Array,
    ids: jax.Array,
    mesh: Mesh,
    rules: ShardingRules,
    row_axis: str,
    *,
    take: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Look up rows of an embedding table by id; inside `jax.jit`.

    With sharded rows each device looks up its own rows and the results are summed (Shoeybi et al.,
    "Megatron-LM", 2019, section 3). The compiler's own partitioning may replicate the gradient, and
    fails inside a `jax.shard_map` over some axes, as in a pipeline. Otherwise the compiler
    partitions `jnp.take`.

    Parameters
    ----------
    table
        [rows, width], floating; sharded by rows only, as the rules define for `row_axis`.
    ids
        [batch, tokens], integers; ids out of range are clipped.
    mesh, rules
        The device mesh and the sharding rules.
    row_axis
        Logical axis of the rows.
    take
        (local table, ids in range) -> rows, on each device; its gradient is summed over devices.
        None is `jnp.take`, which the compiler may partition if the rows are not sharded.

    Returns
    -------
    jax.Array
        [batch, tokens, width], sharded as the ids are.
    """
    around = jax.sharding.get_abstract_mesh()
    ids = ids.clip(0, table.shape[0] - 1)
    [rows] = rules.spec(mesh, (row_axis,), table.shape[:1], without=around.manual_axes)
    if not rows and not around.manual_axes and take is None:
        return jnp.take(table, ids, axis=0)
    pick = take or partial(jnp.take, axis=0)
    batch = "batch" if ids.shape[0] > 1 else None  # positions may be shared by all rows
    of_ids = rules.spec(mesh, (batch, "seq"), ids.shape, without=around.manual_axes)

    def own(table: jax.Array, ids: jax.Array) -> jax.Array:
        if not rows:
            return pick(table, ids)
        ids = ids - jax.lax.axis_index(rows) * table.shape[0]
        here = (ids >= 0) & (ids < table.shape[0])
        found = pick(table, jnp.where(here, ids, 0))
        psum: Any = jax.lax.psum  # JAX gives no types
        summed: jax.Array = psum(jnp.where(here[..., None], found, 0), rows)
        return summed

    spec: Any = PartitionSpec
    run = jax.shard_map(
        own,
        mesh=around if around.axis_names else mesh,
        axis_names=set(mesh.axis_names) - set(around.manual_axes),
        in_specs=(spec(rows), of_ids),
        out_specs=of_ids,
        check_vma=False,
    )
    found: jax.Array = run(table, ids)
    return found
