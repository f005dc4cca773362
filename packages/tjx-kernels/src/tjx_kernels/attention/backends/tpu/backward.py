"""Backward pass on TPU: one kernel each for dq, for dk and dv, and for the bias gradient.

Each recomputes the weights from the log-sum-exp (Dao et al., "FlashAttention", 2022, algorithm 4)
and accumulates its own result in a fixed order, so there are no races.

Axes as in `scores`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tjx_kernels.attention.backends.tpu.scores import (
    LANES,
    Arrays,
    GridPosition,
    Scalars,
    Tile,
    Tiling,
    column,
    dropped,
    launch,
    product,
    result,
    tile_scores,
    visit,
)


def dq(tiling: Tiling, scalars: Scalars, arrays: Arrays) -> jax.Array:
    """Return the gradient of q, [B, N, T, H]."""
    call = tiling.call

    def where(scalars: Scalars, b: Any, n: Any, i: Any, step: Any) -> GridPosition:
        visits = tiling.keys_of(scalars, b, n, i)
        return GridPosition(b, n, i, visits.fetched(step, tiling.k_blocks))

    found = launch(
        "dq",
        _dq,
        tiling,
        (call.batch, call.heads, tiling.q_blocks, tiling.key_steps()),
        3,
        where,
        (scalars, arrays),
        Arrays(q=result(arrays.q, arrays.q.shape)),
        [pltpu.VMEM((tiling.block_q, call.head_dim), jnp.float32), *_row_scratch(tiling)],
    )
    return found.q  # type: ignore[no-any-return]


def dkv(tiling: Tiling, scalars: Scalars, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of k [B, K, S, H] and v [B, K, S, V]."""
    call = tiling.call

    def where(scalars: Scalars, b: Any, m: Any, j: Any, g: Any, step: Any) -> GridPosition:
        head = m * call.group + g
        i = tiling.rows_of(scalars, b, head, j).fetched(step, tiling.q_blocks)
        return GridPosition(b, head, i, j)

    found = launch(
        "dkv",
        _dkv,
        tiling,
        (call.batch, call.kv_heads, tiling.k_blocks, call.group, tiling.row_steps()),
        3,
        where,
        (scalars, arrays),
        Arrays(
            k=result(arrays.k, arrays.k.shape),
            v=result(arrays.v, arrays.v.shape),
        ),
        [
            pltpu.VMEM((tiling.block_k, call.head_dim), jnp.float32),
            pltpu.VMEM((tiling.block_k, call.v_head_dim), jnp.float32),
            pltpu.VMEM((tiling.block_k, LANES), jnp.int32),
        ],
    )
    return found.k, found.v


def dbias(tiling: Tiling, scalars: Scalars, arrays: Arrays) -> jax.Array:
    """Return the gradient of the bias in float32, summed over the rows and heads that share it."""
    call = tiling.call
    assert call.bias is not None
    batch, heads = call.bias

    def where(
        _: Scalars, b: Any, n: Any, i: Any, j: Any, other_b: Any, other_n: Any
    ) -> GridPosition:
        return GridPosition(b + other_b, n + other_n, i, j)

    others = (call.batch // batch, call.heads // heads)
    found = launch(
        "dbias",
        _dbias,
        tiling,
        (batch, heads, tiling.q_blocks, tiling.k_blocks, *others),
        4,
        where,
        (scalars, arrays),
        Arrays(bias=result(arrays.q, arrays.bias.shape, jnp.float32)),
        _row_scratch(tiling),
    )
    return found.bias  # type: ignore[no-any-return]


def _row_scratch(tiling: Tiling) -> list[Any]:
    """Return scratch types for LSE, delta and segment ids of rows, transposed to columns."""
    shape = (tiling.block_q, LANES)
    return [pltpu.VMEM(shape, dtype) for dtype in (jnp.float32, jnp.float32, jnp.int32)]


def _transpose_rows(x: Arrays, scratch: tuple[Any, ...]) -> None:
    for source, target in zip((x.lse, x.delta, x.q_ids), scratch, strict=True):
        if source is not None:
            target[...] = column(source[...])


def _load(x: Arrays) -> Arrays:
    return Arrays(*(None if ref is None else ref[...] for ref in x))


def _load_transposed(x: Arrays, scratch: tuple[Any, ...]) -> Arrays:
    lse, delta, q_ids = (ref[:, :1] for ref in scratch)
    return _load(x)._replace(lse=lse, delta=delta, q_ids=None if x.q_ids is None else q_ids)


def _score_gradients(
    tiling: Tiling, tile: Tile, scalars: Scalars, x: Arrays, *, masked: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Return the score gradients of a tile [block_q, block_k] and the soft cap's derivative."""
    scores, slope = tile_scores(tiling, tile, scalars, x, masked=masked)
    weights = jnp.exp(scores - x.lse)
    dweights = dropped(tiling, tile, scalars, product(x.out, x.v, True))
    return weights * (dweights - x.delta), slope


def _dq(
    tiling: Tiling, scalars: Scalars, x: Arrays, made: Arrays, sum_ref: Any, *rows: Any
) -> None:
    batch, head, block, step = (pl.program_id(axis) for axis in range(4))
    visits = tiling.keys_of(scalars, batch, head, block)

    @pl.when(step == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)
        _transpose_rows(x, rows)

    def process(masked: bool) -> None:
        key = visits.at(step) * tiling.block_k
        tile = Tile(batch, head, block * tiling.block_q, key)
        given = _load_transposed(x, rows)
        dscores, slope = _score_gradients(tiling, tile, scalars, given, masked=masked)
        if slope is not None:
            dscores = dscores * slope
        sum_ref[...] += product(dscores.astype(given.k.dtype), given.k)

    visit(tiling, visits.range, step, tiling.masks_keys, process)

    @pl.when(step == pl.num_programs(3) - 1)
    def _() -> None:
        made.q[...] = (sum_ref[...] * tiling.call.scale).astype(made.q.dtype)


def _dkv(
    tiling: Tiling,
    scalars: Scalars,
    x: Arrays,
    made: Arrays,
    dk_ref: Any,
    dv_ref: Any,
    kv_ids_ref: Any,
) -> None:
    batch, kv_head, block, member, step = (pl.program_id(axis) for axis in range(5))
    head = kv_head * tiling.call.group + member
    visits = tiling.rows_of(scalars, batch, head, block)

    @pl.when((member == 0) & (step == 0))
    def _() -> None:
        dk_ref[...] = jnp.zeros_like(dk_ref)
        dv_ref[...] = jnp.zeros_like(dv_ref)
        if x.kv_ids is not None:
            kv_ids_ref[...] = column(x.kv_ids[...])

    def process(masked: bool) -> None:
        row = visits.at(step) * tiling.block_q
        tile = Tile(batch, head, row, block * tiling.block_k)
        given = _load(x)
        if x.kv_ids is not None:
            given = given._replace(kv_ids=kv_ids_ref[:, :1])
        scores, slope = tile_scores(tiling, tile, scalars, given, masked=masked, transposed=True)
        weights = jnp.exp(scores - given.lse)
        kept = dropped(tiling, tile, scalars, weights, transposed=True)
        dv_ref[...] += product(kept.astype(given.out.dtype), given.out)
        dweights = product(given.v, given.out, True)
        dweights = dropped(tiling, tile, scalars, dweights, transposed=True)
        dscores = weights * (dweights - given.delta)
        if slope is not None:
            dscores = dscores * slope
        dk_ref[...] += product(dscores.astype(given.q.dtype), given.q)

    visit(tiling, visits.range, step, tiling.masks_rows, process)

    @pl.when((member == pl.num_programs(3) - 1) & (step == pl.num_programs(4) - 1))
    def _() -> None:
        # q is scaled already.
        made.k[...] = (dk_ref[...] * tiling.factors[1]).astype(made.k.dtype)
        made.v[...] = dv_ref[...].astype(made.v.dtype)


def _dbias(tiling: Tiling, scalars: Scalars, x: Arrays, made: Arrays, *rows: Any) -> None:
    batch, head, block, k_block, other_batch, other_head = (pl.program_id(a) for a in range(6))
    batch, head = batch + other_batch, head + other_head
    blocks = tiling.key_range(scalars, batch, block)

    @pl.when((other_batch == 0) & (other_head == 0))
    def _() -> None:
        made.bias[...] = jnp.zeros_like(made.bias)

    def process(masked: bool) -> None:
        _transpose_rows(x, rows)
        tile = Tile(batch, head, block * tiling.block_q, k_block * tiling.block_k)
        given = _load_transposed(x, rows)
        made.bias[...] += _score_gradients(tiling, tile, scalars, given, masked=masked)[0]

    # Visit all blocks of keys, so that fully masked ones become 0.
    step = jnp.where(k_block < blocks.start, blocks.stop, k_block) - blocks.start
    visit(tiling, blocks, step, tiling.masks_keys, process)
