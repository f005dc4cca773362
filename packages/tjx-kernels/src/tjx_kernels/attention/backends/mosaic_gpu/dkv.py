"""Kernel for dk and dv on Hopper: each program owns rows of keys and loops over queries.

All tiles are transposed relative to the dq kernel: keys are the rows. Per block of queries:
S = k q^T and dP = v dout^T, P = exp(S - lse), dv += P dout, dS = P (dP - delta), dk += dS q. One
loop covers the query heads of a group: dk and dv of a key head accumulate in registers, in float32
and in a fixed order.

Warpgroups and stages are as in `dq`, with blocks of queries in flight.

Axes: B batch, T queries, S keys, N heads, K key heads, H head_dim, V values' head_dim.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tjx_kernels.attention.backends.mosaic_gpu.pipeline import (
    Inputs,
    Span,
    accumulator,
    add_product,
    commit,
    compiler_params,
    drain,
    for_each,
    free_last,
    opaque_warpgroup,
    spans,
    split_warpgroups,
    staging,
    wait_until_free,
)
from tjx_kernels.attention.backends.mosaic_gpu.scores import (
    COLUMNS,
    ROWS,
    base2,
    first_position,
    interpret_params,
    masked,
    slope,
    tile,
)
from tjx_kernels.attention.backends.mosaic_gpu.tile_order import TileOrder, tile_order
from tjx_kernels.attention.block_sizes import BlockSizes
from tjx_kernels.attention.call import AttentionCall
from tjx_kernels.attention.masks import row_blocks


class _Memory(NamedTuple):
    """Shared memory: one tile per compute warpgroup (k, v, kv_ids) or per stage (the others)."""

    k: Any
    v: Any
    kv_ids: Any
    q: Any
    dout: Any
    rows: Any
    q_ids: Any
    staging: Any


class _Barriers(NamedTuple):
    """`own`: keys of a warpgroup arrived; `q`, `dout`: stage arrived; `free`: stage was read."""

    own: Any
    q: Any
    dout: Any
    free: Any


class _Work(NamedTuple):
    """Work of a program: its keys from `first_key` on, and the blocks of rows that it visits."""

    batch: Any
    kv_head: Any
    first_key: Any
    offset: Any
    visits: list[Span]


def dkv_kernel(
    call: AttentionCall, sizes: BlockSizes, inputs: Inputs, wanted: tuple[str, ...]
) -> dict[str, jax.Array]:
    """Compute dk [B, S, K, H] if "k" is wanted and dv [B, S, K, V] if "v" is.

    `inputs.ranges` holds the blocks of queries of each program's keys.
    """
    assert sizes.stages >= 2, "a stage is freed while the next one is read"
    keys = sizes.k * sizes.warps
    types = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype)  # type: ignore[no-untyped-call]  # jax's
        for name, x in (("k", inputs.k), ("v", inputs.v))
    }
    streamed = sum(
        call.group * call.q_len * x.shape[3] * x.dtype.itemsize for x in (inputs.q, inputs.dout)
    )
    # Under a causal mask the first keys are visible to the most rows.
    tiles = -(-call.kv_len // keys)
    order = tile_order(call, tiles, call.kv_heads, streamed, last_first=False)
    found: dict[str, jax.Array] = plgpu.kernel(
        partial(_body, call, sizes, keys, order),
        out_type={name: types[name] for name in wanted},
        scratch_types=[_memory(call, sizes), _barriers(call, sizes)],
        grid=(order.total,),
        grid_names=("program",),
        num_threads=sizes.warps + 1,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        interpret=interpret_params(call),
        kernel_name=f"flash_attention_d{''.join(wanted)}",
    )(inputs)
    return found


def _memory(call: AttentionCall, sizes: BlockSizes) -> _Memory:
    own, stages, dtype = (sizes.warps, sizes.k), (sizes.stages, sizes.q), call.dtype
    ids = call.segment_ids
    return _Memory(
        k=tile((*own, call.head_dim), dtype, sizes.q),
        v=tile((*own, call.v_head_dim), dtype, sizes.q),
        kv_ids=plgpu.SMEM(own, jnp.int32) if ids else None,
        q=tile((*stages, call.head_dim), dtype, sizes.q),
        dout=tile((*stages, call.v_head_dim), dtype, sizes.q),
        rows=plgpu.SMEM((sizes.stages, 2, sizes.q), jnp.float32),
        q_ids=plgpu.SMEM(stages, jnp.int32) if ids else None,
        staging=staging(call, (*own, sizes.q)),
    )


def _barriers(call: AttentionCall, sizes: BlockSizes) -> _Barriers:
    # A barrier counts arrived copies or finished warpgroups.
    with_ids = 1 if call.segment_ids else 0
    return _Barriers(
        own=plgpu.Barrier(num_arrivals=2 + with_ids, num_barriers=sizes.warps),
        q=plgpu.Barrier(num_arrivals=2 + with_ids, num_barriers=sizes.stages),
        dout=plgpu.Barrier(num_barriers=sizes.stages),
        free=plgpu.Barrier(num_arrivals=sizes.warps, num_barriers=sizes.stages),
    )


def _body(
    call: AttentionCall,
    sizes: BlockSizes,
    keys: int,
    order: TileOrder,
    inputs: Inputs,
    outputs: dict[str, Any],
    memory: _Memory,
    barriers: _Barriers,
) -> None:
    head_of_all, index = order.place(lax.axis_index("program"))
    kv_heads = jnp.int32(call.kv_heads)
    batch, kv_head = lax.div(head_of_all, kv_heads), lax.rem(head_of_all, kv_heads)
    first_key = index * keys
    offset = first_position(call, inputs.offset, batch)
    rows = row_blocks(call, offset, first_key, keys, sizes.q)
    # Rows past the end need no mask: q, dout, lse and delta are 0 there, and so are their
    # contributions. Keys past the end are separate rows of the result, which are dropped.
    partly = (call.lookahead is not None, call.window is not None)
    visits = spans(call, rows, inputs.ranges, (batch, index), partly)
    work = _Work(batch, kv_head, first_key, offset, visits)
    split_warpgroups(
        sizes.warps,
        partial(_compute, call, sizes, outputs, memory, barriers, work),
        partial(_fetch, call, sizes, inputs, memory, barriers, work),
    )


def _fetch(
    call: AttentionCall,
    sizes: BlockSizes,
    inputs: Inputs,
    memory: _Memory,
    barriers: _Barriers,
    work: _Work,
) -> None:
    copy = plgpu.copy_gmem_to_smem
    b = work.batch
    for w in range(sizes.warps):
        own, barrier = pl.ds(work.first_key + w * sizes.k, sizes.k), barriers.own.at[w]
        copy(inputs.k.at[b, own, work.kv_head], memory.k.at[w], barrier)
        copy(inputs.v.at[b, own, work.kv_head], memory.v.at[w], barrier)
        if call.segment_ids:
            copy(inputs.kv_ids.at[b, own], memory.kv_ids.at[w], barrier)

    def fetch(_hide: bool, step: Any, member: Any, block: Any) -> None:
        slot = wait_until_free(barriers.free, sizes.stages, step)
        n = work.kv_head * call.group + member
        rows = pl.ds(block * sizes.q, sizes.q)
        copy(inputs.q.at[b, rows, n], memory.q.at[slot], barriers.q.at[slot])
        copy(inputs.rows.at[b, n, :, rows], memory.rows.at[slot], barriers.q.at[slot])
        if call.segment_ids:
            copy(inputs.q_ids.at[b, rows], memory.q_ids.at[slot], barriers.q.at[slot])
        copy(inputs.dout.at[b, rows, n], memory.dout.at[slot], barriers.dout.at[slot])

    drain(barriers.free, sizes.stages, for_each(work.visits, call.group, fetch))


def _compute(
    call: AttentionCall,
    sizes: BlockSizes,
    outputs: dict[str, Any],
    memory: _Memory,
    barriers: _Barriers,
    work: _Work,
) -> None:
    w = lax.axis_index("warpgroup")
    first_key = work.first_key + w * sizes.k
    plgpu.barrier_wait(barriers.own.at[w])
    kv_ids = plgpu.load(memory.kv_ids.at[w], layout=ROWS) if call.segment_ids else None

    def along_rows(row_T: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(row_T, (sizes.k, sizes.q), [1])

    def visit(totals: dict[str, Any], hide: bool, step: Any, _member: Any, block: Any) -> None:
        slot = lax.rem(step, jnp.int32(sizes.stages))
        w = opaque_warpgroup()
        k_SH, v_SV = memory.k.at[w], memory.v.at[w]
        q_TH, dout_TV = memory.q.at[slot], memory.dout.at[slot]

        def weights(scores: Any) -> tuple[jax.Array, jax.Array]:
            plgpu.barrier_wait(barriers.q.at[slot])
            plgpu.wgmma(scores, k_SH, q_TH.transpose((1, 0)))
            # Products finish in issue order: with only the scores in flight, the previous step has
            # finished with its stage.
            plgpu.wgmma_wait(1)
            free_last(barriers.free, sizes.stages, step)
            x, factor = base2(call, plgpu.wgmma_accumulator_load(scores, wait_n=0))
            by_cap = slope(call, x)
            if hide:
                q_ids = None
                if call.segment_ids:
                    q_ids = plgpu.load(memory.q_ids.at[slot], layout=COLUMNS)
                position = work.offset + block * sizes.q
                x = masked(call, x, position, first_key, q_axis=1, q_ids=q_ids, kv_ids=kv_ids)
            lse_T = plgpu.load(memory.rows.at[slot, 0], layout=COLUMNS)
            p = jnp.exp2(x * factor - along_rows(lse_T))
            return p.astype(call.dtype), p * by_cap

        def add_both(p: jax.Array, ds_by_dp: jax.Array, dp: Any) -> None:
            plgpu.wgmma(dp, v_SV, dout_TV.transpose((1, 0)))
            if "v" in totals:
                add_product(totals["v"], p, dout_TV, memory.staging, w)
            # The product of dv overlaps with the computation of dS.
            dp_ST = plgpu.wgmma_accumulator_load(dp, wait_n=1 if "v" in totals else 0)
            delta_T = plgpu.load(memory.rows.at[slot, 1], layout=COLUMNS)
            ds = ds_by_dp * (dp_ST - along_rows(delta_T))
            add_product(totals["k"], ds.astype(call.dtype), q_TH, memory.staging, w)

        scores = accumulator(sizes.k, sizes.q)
        p, ds_by_dp = pl.run_scoped(weights, scores)
        plgpu.barrier_wait(barriers.dout.at[slot])
        if "k" in totals:
            pl.run_scoped(partial(add_both, p, ds_by_dp), scores)
        else:
            add_product(totals["v"], p, dout_TV, memory.staging, w)

    def all_steps(totals: dict[str, Any]) -> dict[str, jax.Array]:
        for_each(work.visits, call.group, partial(visit, totals))
        return {name: plgpu.wgmma_accumulator_load(x, wait_n=0) for name, x in totals.items()}

    tiles = {"k": memory.k.at[w], "v": memory.v.at[w]}
    widths = {"k": call.head_dim, "v": call.v_head_dim}
    factors = {"k": call.scale, "v": 1.0}
    accumulators = {name: accumulator(sizes.k, widths[name]) for name in outputs}
    found = pl.run_scoped(all_steps, accumulators)
    for name, total in found.items():
        tiles[name][...] = (total * factors[name]).astype(call.dtype)
    commit()
    for name, output in outputs.items():
        at = (work.batch, pl.ds(first_key, sizes.k), work.kv_head)
        plgpu.copy_smem_to_gmem(tiles[name], output.at[at])
    plgpu.wait_smem_to_gmem(0)
