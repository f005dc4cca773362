"""Kernel for dq on Hopper above head_dim 64: each program owns queries and loops over their keys.

Per block of keys: S = q k^T and dP = dout v^T, P = exp(S - lse), dS = P (dP - delta), dq += dS k
(Dao et al., "FlashAttention", 2022, algorithm 4, without its atomic additions).

A program has `warps` compute warpgroups with `q` rows each and one warpgroup that only copies
blocks of keys, `stages` of them ahead (warp specialization: Shah et al.,
"FlashAttention-3", 2024, section 3.1).

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
from tjx_kernels.attention.masks import key_blocks


class _Memory(NamedTuple):
    """Shared memory: a tile for each compute warpgroup (q, dout, rows, q_ids) or stage (others)."""

    q: Any
    dout: Any
    rows: Any
    q_ids: Any
    k: Any
    v: Any
    kv_ids: Any
    staging: Any


class _Barriers(NamedTuple):
    """`own`: rows of a warpgroup arrived; `k`, `v`: stage arrived; `free`: stage was read."""

    own: Any
    k: Any
    v: Any
    free: Any


class _Work(NamedTuple):
    """Work of a program: its rows from `first_row` on, and the blocks of keys that it visits."""

    batch: Any
    head: Any
    kv_head: Any
    first_row: Any
    visits: list[Span]


def dq_kernel(call: AttentionCall, sizes: BlockSizes, inputs: Inputs) -> jax.Array:
    """Compute dq [B, T, N, H]; `inputs.ranges` has the blocks of keys of each program's rows."""
    assert sizes.stages >= 2, "a stage is freed while the next one is read"
    tiles = -(-call.q_len // (sizes.q * sizes.warps))
    streamed = sum(call.kv_len * x.shape[3] * x.dtype.itemsize for x in (inputs.k, inputs.v))
    # Under a causal mask later rows have more keys.
    order = tile_order(call, tiles, call.heads, streamed, last_first=True)
    dq: jax.Array = plgpu.kernel(
        partial(_body, call, sizes, order),
        out_type=jax.ShapeDtypeStruct(  # type: ignore[no-untyped-call]  # jax has no type for it
            inputs.q.shape, inputs.q.dtype
        ),
        scratch_types=[_memory(call, sizes), _barriers(call, sizes)],
        grid=(order.total,),
        grid_names=("program",),
        num_threads=sizes.warps + 1,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        interpret=interpret_params(call),
        kernel_name="flash_attention_dq",
    )(inputs)
    return dq


def _memory(call: AttentionCall, sizes: BlockSizes) -> _Memory:
    own, stages, dtype = (sizes.warps, sizes.q), (sizes.stages, sizes.k), call.dtype
    ids = call.segment_ids
    return _Memory(
        q=tile((*own, call.head_dim), dtype, sizes.k),
        dout=tile((*own, call.v_head_dim), dtype, sizes.k),
        rows=plgpu.SMEM((sizes.warps, 2, sizes.q), jnp.float32),
        q_ids=plgpu.SMEM(own, jnp.int32) if ids else None,
        k=tile((*stages, call.head_dim), dtype, sizes.k),
        v=tile((*stages, call.v_head_dim), dtype, sizes.k),
        kv_ids=plgpu.SMEM(stages, jnp.int32) if ids else None,
        staging=staging(call, (*own, sizes.k)),
    )


def _barriers(call: AttentionCall, sizes: BlockSizes) -> _Barriers:
    # A barrier counts arrived copies or finished warpgroups.
    with_ids = 1 if call.segment_ids else 0
    return _Barriers(
        own=plgpu.Barrier(num_arrivals=3 + with_ids, num_barriers=sizes.warps),
        k=plgpu.Barrier(num_arrivals=1 + with_ids, num_barriers=sizes.stages),
        v=plgpu.Barrier(num_barriers=sizes.stages),
        free=plgpu.Barrier(num_arrivals=sizes.warps, num_barriers=sizes.stages),
    )


def _body(
    call: AttentionCall,
    sizes: BlockSizes,
    order: TileOrder,
    inputs: Inputs,
    dq_BTNH: Any,
    memory: _Memory,
    barriers: _Barriers,
) -> None:
    head_of_all, index = order.place(lax.axis_index("program"))
    heads = jnp.int32(call.heads)
    batch, head = lax.div(head_of_all, heads), lax.rem(head_of_all, heads)
    rows = sizes.q * sizes.warps
    first_row = index * rows
    position = first_position(call, inputs.offset, batch) + first_row
    blocks = key_blocks(call, position, rows, sizes.k)
    partly = (call.window is not None, call.lookahead is not None or call.kv_len % sizes.k != 0)
    visits = spans(call, blocks, inputs.ranges, (batch, index), partly)
    work = _Work(batch, head, lax.div(head, jnp.int32(call.group)), first_row, visits)
    split_warpgroups(
        sizes.warps,
        partial(_compute, call, sizes, inputs, dq_BTNH, memory, barriers, work),
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
    b, n = work.batch, work.head
    for w in range(sizes.warps):
        own, barrier = pl.ds(work.first_row + w * sizes.q, sizes.q), barriers.own.at[w]
        copy(inputs.q.at[b, own, n], memory.q.at[w], barrier)
        copy(inputs.dout.at[b, own, n], memory.dout.at[w], barrier)
        copy(inputs.rows.at[b, n, :, own], memory.rows.at[w], barrier)
        if call.segment_ids:
            copy(inputs.q_ids.at[b, own], memory.q_ids.at[w], barrier)

    def fetch(_hide: bool, step: Any, _repeat: Any, block: Any) -> None:
        slot = wait_until_free(barriers.free, sizes.stages, step)
        keys = pl.ds(block * sizes.k, sizes.k)
        copy(inputs.k.at[b, keys, work.kv_head], memory.k.at[slot], barriers.k.at[slot])
        if call.segment_ids:
            copy(inputs.kv_ids.at[b, keys], memory.kv_ids.at[slot], barriers.k.at[slot])
        copy(inputs.v.at[b, keys, work.kv_head], memory.v.at[slot], barriers.v.at[slot])

    drain(barriers.free, sizes.stages, for_each(work.visits, 1, fetch))


def _compute(
    call: AttentionCall,
    sizes: BlockSizes,
    inputs: Inputs,
    dq_BTNH: Any,
    memory: _Memory,
    barriers: _Barriers,
    work: _Work,
) -> None:
    w = lax.axis_index("warpgroup")
    first_row = work.first_row + w * sizes.q
    position = first_position(call, inputs.offset, work.batch) + first_row
    plgpu.barrier_wait(barriers.own.at[w])
    lse_T = plgpu.load(memory.rows.at[w, 0], layout=ROWS)
    delta_T = plgpu.load(memory.rows.at[w, 1], layout=ROWS)
    q_ids = plgpu.load(memory.q_ids.at[w], layout=ROWS) if call.segment_ids else None

    def along_keys(row_T: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(row_T, (sizes.q, sizes.k), [0])

    def visit(dq: Any, hide: bool, step: Any, _repeat: Any, block: Any) -> None:
        slot = lax.rem(step, jnp.int32(sizes.stages))
        w = opaque_warpgroup()
        q_TH, dout_TV = memory.q.at[w], memory.dout.at[w]
        k_SH, v_SV = memory.k.at[slot], memory.v.at[slot]

        def gradient(scores: Any, dp: Any) -> None:
            plgpu.barrier_wait(barriers.k.at[slot])
            plgpu.wgmma(scores, q_TH, k_SH.transpose((1, 0)))
            plgpu.barrier_wait(barriers.v.at[slot])
            plgpu.wgmma(dp, dout_TV, v_SV.transpose((1, 0)))
            # Products finish in issue order: with one in flight, the scores are complete, and so is
            # the previous step's addition to dq. Free its keys.
            raw = plgpu.wgmma_accumulator_load(scores, wait_n=1)
            free_last(barriers.free, sizes.stages, step)
            x, factor = base2(call, raw)
            by_cap = slope(call, x)
            if hide:
                kv_ids = None
                if call.segment_ids:
                    kv_ids = plgpu.load(memory.kv_ids.at[slot], layout=COLUMNS)
                first_key = block * sizes.k
                x = masked(call, x, position, first_key, q_axis=0, q_ids=q_ids, kv_ids=kv_ids)
            p = jnp.exp2(x * factor - along_keys(lse_T))
            dp_TS = plgpu.wgmma_accumulator_load(dp, wait_n=0)
            ds = p * (dp_TS - along_keys(delta_T)) * by_cap
            add_product(dq, ds.astype(call.dtype), k_SH, memory.staging, w)

        scores = accumulator(sizes.q, sizes.k)
        pl.run_scoped(gradient, scores, scores)

    def all_steps(dq: Any) -> jax.Array:
        for_each(work.visits, 1, partial(visit, dq))
        total: jax.Array = plgpu.wgmma_accumulator_load(dq, wait_n=0)
        return total

    dq = pl.run_scoped(all_steps, accumulator(sizes.q, call.head_dim))
    q_TH = memory.q.at[w]
    q_TH[...] = (dq * call.scale).astype(call.dtype)
    commit()
    plgpu.copy_smem_to_gmem(q_TH, dq_BTNH.at[work.batch, pl.ds(first_row, sizes.q), work.head])
    plgpu.wait_smem_to_gmem(0)
