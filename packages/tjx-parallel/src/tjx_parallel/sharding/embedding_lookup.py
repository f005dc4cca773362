"""Looking up rows of a table that may be divided by rows."""

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
    """Return rows of a table by id; inside `jax.jit`.

    Where rows are divided each device looks up its own, and they are summed (Shoeybi et al. 2019,
    "Megatron-LM", section 3): the compiler may replicate the gradient in passing, and within a
    `jax.shard_map` over some axes, as in a pipeline, it fails. Elsewhere it is the compiler's.

    Parameters
    ----------
    table
        [rows, width], float; divided by rows alone, as the rules say of `row_axis`.
    ids
        [batch, tokens], integers; those outside the table are clipped to it.
    mesh, rules
        The mesh and its table.
    row_axis
        Logical name of the rows.
    take
        From a table and ids within it to the rows, on each device; its gradient is summed over
        devices. None is `jnp.take`, which the compiler may divide where rows are not divided.

    Returns
    -------
    jax.Array
        [batch, tokens, width], divided as the ids are.
    """
    around = jax.sharding.get_abstract_mesh()
    ids = ids.clip(0, table.shape[0] - 1)
    [rows] = rules.spec(mesh, (row_axis,), table.shape[:1], without=around.manual_axes)
    if not rows and not around.manual_axes and take is None:
        return jnp.take(table, ids, axis=0)
    pick = take or partial(jnp.take, axis=0)
    batch = "batch" if ids.shape[0] > 1 else None  # positions may be the same for all rows
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
