"""Forward pass on TPU: online softmax over the key blocks visible to a block of rows.

Axes as in `scores`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tjx_kernels.attention.backends.tpu.scores import (
    LANES,
    LOWEST,
    Arrays,
    GridPosition,
    Scalars,
    Tile,
    Tiling,
    column,
    dropped,
    lanes,
    launch,
    product,
    result,
    tile_scores,
    visit,
)


def forward(tiling: Tiling, scalars: Scalars, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """Return output [B, N, T, V] and LSE [B, N, 1, T]."""
    call, rows = tiling.call, tiling.q_blocks * tiling.block_q
    shape = (call.batch, call.heads, rows, call.v_head_dim)

    def where(scalars: Scalars, b: Any, n: Any, i: Any, step: Any) -> GridPosition:
        visits = tiling.keys_of(scalars, b, n, i)
        return GridPosition(b, n, i, visits.fetched(step, tiling.k_blocks))

    found = launch(
        "forward",
        _kernel,
        tiling,
        (call.batch, call.heads, tiling.q_blocks, tiling.key_steps()),
        3,
        where,
        (scalars, arrays),
        Arrays(
            out=result(arrays.q, shape),
            lse=result(arrays.q, (*shape[:2], 1, rows), jnp.float32),
        ),
        [
            pltpu.VMEM((tiling.block_q, LANES), jnp.float32),
            pltpu.VMEM((tiling.block_q, LANES), jnp.float32),
            pltpu.VMEM((tiling.block_q, call.v_head_dim), jnp.float32),
            pltpu.VMEM((tiling.block_q, LANES), jnp.int32),
        ],
    )
    return found.out, found.lse


def _kernel(
    tiling: Tiling,
    scalars: Scalars,
    x: Arrays,
    made: Arrays,
    top_ref: Any,
    total_ref: Any,
    sum_ref: Any,
    q_ids_ref: Any,
) -> None:
    batch, head, block, step = (pl.program_id(axis) for axis in range(4))
    visits = tiling.keys_of(scalars, batch, head, block)

    @pl.when(step == 0)
    def _() -> None:
        top_ref[...] = jnp.full_like(top_ref, LOWEST)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        if x.q_ids is not None:
            q_ids_ref[...] = column(x.q_ids[...])

    def process(masked: bool) -> None:
        key = visits.at(step) * tiling.block_k
        tile = Tile(batch, head, block * tiling.block_q, key)
        given = Arrays(*(None if ref is None else ref[...] for ref in x))
        if x.q_ids is not None:
            given = given._replace(q_ids=q_ids_ref[:, :1])
        scores, _ = tile_scores(tiling, tile, scalars, given, masked=masked)
        before = top_ref[...]
        top = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp(scores - lanes(top, tiling.block_k))
        shrink = jnp.exp(before - top)
        top_ref[...] = top
        total_ref[...] = shrink * total_ref[...] + jnp.sum(weights, axis=1, keepdims=True)
        weights = dropped(tiling, tile, scalars, weights)
        sum_ref[...] = sum_ref[...] * lanes(shrink, tiling.call.v_head_dim) + product(
            weights.astype(given.v.dtype), given.v
        )

    visit(tiling, visits.range, step, tiling.masks_keys, process)

    @pl.when(step == pl.num_programs(3) - 1)
    def _() -> None:
        total = total_ref[...]
        dead = total == 0
        share = 1 / jnp.where(dead, 1.0, total)
        out = sum_ref[...] * lanes(share, tiling.call.v_head_dim)
        made.out[...] = out.astype(made.out.dtype)
        lse = jnp.where(dead, -jnp.inf, top_ref[...] + jnp.log(jnp.where(dead, 1.0, total)))
        made.lse[...] = lse.T[:1]
