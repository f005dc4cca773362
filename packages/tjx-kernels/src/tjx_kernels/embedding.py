"""Embedding lookup with a deterministic gradient on every platform.

The gradient of a lookup sums the cotangents of equal ids. XLA computes it by a scatter-add, which
is ordered on CPUs and TPUs. On GPUs it compiles to floating-point atomics, whose order differs from
run to run, even for indices declared as sorted. There the cotangents are sorted by id and summed by
products with 0/1 matrices instead.

Axes in names: N ids, D width, V rows of the table, K rows of a block.
"""

from typing import Any

import jax
import jax.numpy as jnp

# Rows that one product sums. Each level of the sum is shorter by this factor, and its products cost
# 2 * BLOCK * width FLOPs per row: little compared with moving the rows.
BLOCK = 128


@jax.custom_vjp
def embedding_lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Look up rows of an embedding table by id; ids out of range are clipped.

    Differentiable in reverse mode. The gradient is deterministic on CPUs, GPUs and TPUs: equal
    inputs give equal bits.

    Parameters
    ----------
    table : [V, D]
        Floating.
    ids : integers [...]
        Row indices.

    Returns
    -------
    jax.Array
        [..., D], of the table's dtype.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from tjx_kernels.embedding import embedding_lookup
    >>> table, ids = jnp.arange(6.0).reshape(3, 2), jnp.array([2, 0, 2])
    >>> print(jax.grad(lambda table: embedding_lookup(table, ids).sum())(table))
    [[1. 1.]
     [0. 0.]
     [2. 2.]]
    """
    return jnp.take(table, ids, axis=0, mode="clip")


def _forward(table: jax.Array, ids: jax.Array) -> tuple[jax.Array, Any]:
    # An empty slice carries the table's shape and dtype.
    return embedding_lookup(table, ids), (table[:, :0], ids)


def _backward(residuals: Any, dy: jax.Array) -> tuple[jax.Array, None]:
    like, ids = residuals
    count = like.shape[0]
    ids = jnp.clip(ids, 0, count - 1).reshape(-1)
    dy = dy.reshape(ids.size, dy.shape[-1])

    def scatter(ids: jax.Array, dy: jax.Array) -> jax.Array:
        return jnp.zeros((count, dy.shape[1]), dy.dtype).at[ids].add(dy)

    def ordered(ids: jax.Array, dy: jax.Array) -> jax.Array:
        return sum_by_id(ids, dy, count)

    dtable: jax.Array = jax.lax.platform_dependent(
        ids, dy, cuda=ordered, rocm=ordered, default=scatter
    )
    return dtable.astype(like.dtype), None


embedding_lookup.defvjp(_forward, _backward)


def sum_by_id(ids: jax.Array, rows: jax.Array, count: int) -> jax.Array:
    """Sum rows by id deterministically, without atomics (a segment sum).

    The rows are sorted by id and divided into blocks of `BLOCK`. Within a block a product with the
    0/1 matrix of equal ids sums the rows of each id. The rows of an id may continue in the next
    blocks: the sums of the first id of each block are rows with sorted ids again, and are summed
    in the same way until one block is left.

    Parameters
    ----------
    ids : int32 [N]
        From 0 to count - 1, in any order.
    rows : [N, D]
        Floating; sums are computed in float32, or float64 for float64 rows.
    count
        Number of ids, V.

    Returns
    -------
    jax.Array
        [V, D] in the dtype of the sums; 0 for ids that do not occur.
    """
    dtype = jnp.promote_types(rows.dtype, jnp.float32)
    total = jnp.zeros((count, rows.shape[1]), dtype)
    if ids.size == 0:
        return total
    index_N = jnp.arange(ids.size, dtype=jnp.int32)
    ids_N, order_N = jax.lax.sort((ids.astype(jnp.int32), index_N), num_keys=1, is_stable=True)
    rows_ND = rows[order_N]
    while True:
        size = min(BLOCK, ids_N.size)
        # Padding has the id V, which is never read.
        pad = -ids_N.size % size
        ids_N = jnp.pad(ids_N, (0, pad), constant_values=count)
        rows_ND = jnp.pad(rows_ND, ((0, pad), (0, 0)))
        ids_BK = ids_N.reshape(-1, size)
        equal_BKK = (ids_BK[:, :, None] == ids_BK[:, None, :]).astype(rows_ND.dtype)
        sums_BKD = jnp.einsum(
            "bij,bjd->bid",
            equal_BKK,
            rows_ND.reshape(*ids_BK.shape, -1),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=dtype,
        )
        last_level = ids_BK.shape[0] == 1
        first_V = _first_index(ids_N, count)
        # The next level sums the ids that begin a block.
        here_V = (first_V >= 0) & (last_level | (first_V % size != 0))
        found_VD = sums_BKD.reshape(ids_N.size, -1)[jnp.maximum(first_V, 0)]
        total = total + jnp.where(here_V[:, None], found_VD, 0)
        if last_level:
            return total
        ids_N, rows_ND = ids_BK[:, 0], sums_BKD[:, 0]


def _first_index(sorted_ids: jax.Array, count: int) -> jax.Array:
    """Return the index of the first occurrence of each id, int32 [V]; -1 if it is absent."""
    index_N = jnp.arange(sorted_ids.size, dtype=jnp.int32)
    is_first = jnp.diff(sorted_ids, prepend=-1) != 0
    # Targets are unique, and out-of-range ones are dropped: plain stores, no atomics.
    target_N = jnp.where(is_first, sorted_ids, count + 1 + index_N)
    nowhere = jnp.full(count, -1, jnp.int32)
    return nowhere.at[target_N].set(index_N, mode="drop", unique_indices=True)
