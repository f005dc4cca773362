"""Backward kernel on Hopper: each program owns rows of keys and loops over queries.

Keys are the rows of all tiles. Per block of queries: S = k q^T and dP = v dout^T,
P = exp(S - lse), dv += P dout, dS = P (dP - delta), dk += dS q, and dq += dS^T k: five products.
The caller chooses which of dq, dk and dv a kernel computes. One loop covers the query heads of a
group: dk and dv of a key head accumulate in registers, in float32 and in a fixed order. `dq_sum`
describes dq.

A program has `warps` compute warpgroups with `k` keys each and one warpgroup that only copies
blocks of `q` queries, `stages` of them ahead (warp specialization: Shah et al.,
"FlashAttention-3", 2024, section 3.1). With dq a step covers as many blocks of queries as there are
compute warpgroups, since each one computes the part of dq of one block.

Axes: B batch, T queries, S keys, N heads, K key heads, H head_dim, V values' head_dim.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tjx_kernels.attention.backends.mosaic_gpu.dq_sum import (
    DqPart,
    exchange_barriers,
    exchange_memory,
    new_counters,
    new_sum,
    read_sum,
)
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
    """Shared memory: one tile per compute warpgroup (k, v) or per stage (the others)."""

    k: Any
    v: Any
    q: Any
    dout: Any
    rows: Any
    q_ids: Any
    staging: Any
    exchange: Any


class _Barriers(NamedTuple):
    """`own`: keys of a warpgroup arrived; `q`, `dout`: stage arrived; `free`: stage was read."""

    own: Any
    q: Any
    dout: Any
    free: Any
    exchange: Any


class _Shape(NamedTuple):
    """Tiles of a kernel: blocks of queries in a step, queries of a step, keys of a program."""

    blocks: int
    queries: int
    keys: int


class _Work(NamedTuple):
    """Work of a program: its keys from `first_key` on, and the steps of queries that it visits."""

    batch: Any
    kv_head: Any
    index: Any
    first_key: Any
    offset: Any
    visits: list[Span]
    dq: DqPart | None = None


def step_queries(sizes: BlockSizes, wanted: tuple[str, ...]) -> int:
    """Return the number of queries in a step of the kernel."""
    return sizes.q * (sizes.warps if "q" in wanted else 1)


def gradients_kernel(
    call: AttentionCall, sizes: BlockSizes, inputs: Inputs, wanted: tuple[str, ...]
) -> dict[str, jax.Array]:
    """Compute dk [B, S, K, H] if "k" is wanted, dv [B, S, K, V] if "v", dq [B, T, N, H] if "q".

    `inputs.ranges` holds the steps of queries of each program's keys. dq needs dk.
    """
    assert sizes.stages >= 2, "a stage is freed while the next one is read"
    queries = step_queries(sizes, wanted)
    shape = _Shape(queries // sizes.q, queries, sizes.k * sizes.warps)
    types = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype)  # type: ignore[no-untyped-call]  # jax's
        for name, x in (("k", inputs.k), ("v", inputs.v))
        if name in wanted
    }
    width = sum(x.shape[3] * x.dtype.itemsize for x in (inputs.q, inputs.dout))
    width += call.head_dim * jnp.dtype(jnp.float32).itemsize if "q" in wanted else 0
    # Under a causal mask the first keys are visible to the most rows.
    tiles = -(-call.kv_len // shape.keys)
    streamed = call.group * call.q_len * width
    order = tile_order(call, tiles, call.kv_heads, streamed, last_first=False)
    total = new_sum(call, sizes, tiles) if "q" in wanted else None
    found: dict[str, jax.Array] = plgpu.kernel(
        partial(_body, call, sizes, shape, order),
        out_type=types,
        scratch_types=[_memory(call, sizes, wanted), _barriers(call, sizes, wanted)],
        grid=(order.total,),
        grid_names=("program",),
        num_threads=sizes.warps + 1,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        interpret=interpret_params(call),
        kernel_name=f"flash_attention_d{''.join(wanted)}",
    )(inputs, total)
    return found if total is None else {**found, "q": read_sum(call, total)}


def _memory(call: AttentionCall, sizes: BlockSizes, wanted: tuple[str, ...]) -> _Memory:
    own, stages, dtype = (sizes.warps, sizes.k), (sizes.stages, sizes.q), call.dtype
    ids = call.segment_ids
    return _Memory(
        k=tile((*own, call.head_dim), dtype, sizes.q),
        v=tile((*own, call.v_head_dim), dtype, sizes.q),
        q=tile((*stages, call.head_dim), dtype, sizes.q),
        dout=tile((*stages, call.v_head_dim), dtype, sizes.q),
        rows=plgpu.SMEM((sizes.stages, 2, sizes.q), jnp.float32),
        q_ids=plgpu.SMEM(stages, jnp.int32) if ids else None,
        staging=staging(call, (*own, sizes.q)),
        exchange=exchange_memory(call, sizes) if "q" in wanted else None,
    )


def _barriers(call: AttentionCall, sizes: BlockSizes, wanted: tuple[str, ...]) -> _Barriers:
    # A barrier counts arrived copies or finished warpgroups.
    with_ids = 1 if call.segment_ids else 0
    return _Barriers(
        own=plgpu.Barrier(num_arrivals=2, num_barriers=sizes.warps),
        q=plgpu.Barrier(num_arrivals=2 + with_ids, num_barriers=sizes.stages),
        dout=plgpu.Barrier(num_barriers=sizes.stages),
        free=plgpu.Barrier(num_arrivals=sizes.warps, num_barriers=sizes.stages),
        exchange=exchange_barriers(sizes) if "q" in wanted else None,
    )


def _body(
    call: AttentionCall,
    sizes: BlockSizes,
    shape: _Shape,
    order: TileOrder,
    inputs: Inputs,
    total: Any,
    outputs: dict[str, Any],
    memory: _Memory,
    barriers: _Barriers,
) -> None:
    counters = None if total is None else new_counters(call, sizes)

    def work() -> _Work:
        # Each role computes it, opaquely: shared values would occupy the few registers of the copy
        # warpgroup.
        program = lax.optimization_barrier(lax.axis_index("program"))  # type: ignore[no-untyped-call]  # jax has no type
        found = _work(call, shape, order, inputs, program)
        if total is None:
            return found
        place = total, counters, inputs.turns, found.batch, found.kv_head, found.index
        dq = DqPart(
            call, sizes, memory.exchange, barriers.exchange, *place, found.offset, found.visits
        )
        return found._replace(dq=dq)

    split_warpgroups(
        sizes.warps,
        lambda: _compute(call, sizes, shape, inputs, outputs, memory, barriers, work()),
        lambda: _fetch(call, sizes, shape, inputs, memory, barriers, work()),
    )


def _work(
    call: AttentionCall, shape: _Shape, order: TileOrder, inputs: Inputs, program: Any
) -> _Work:
    head_of_all, index = order.place(program)
    kv_heads = jnp.int32(call.kv_heads)
    batch, kv_head = lax.div(head_of_all, kv_heads), lax.rem(head_of_all, kv_heads)
    first_key = index * shape.keys
    offset = first_position(call, inputs.offset, batch)
    rows = row_blocks(call, offset, first_key, shape.keys, shape.queries)
    # Rows past the end need no mask: q, dout, lse and delta are 0 there, and so are their
    # contributions. Keys past the end do: exp(0 - lse) may be infinite, and dq sums over keys.
    ragged = call.kv_len % shape.keys != 0
    if ragged:
        whole = index < order.tiles - 1
        start, stop = (jnp.where(whole, x, rows.stop) for x in (rows.full_start, rows.full_stop))
        rows = rows._replace(full_start=start, full_stop=stop)
    partly = (call.lookahead is not None or ragged, call.window is not None)
    visits = spans(call, rows, inputs.ranges, (batch, index), partly)
    return _Work(batch, kv_head, index, first_key, offset, visits)


def _fetch(
    call: AttentionCall,
    sizes: BlockSizes,
    shape: _Shape,
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

    def fetch(_hide: bool, step: Any, member: Any, block: Any) -> None:
        n = work.kv_head * call.group + member

        @pl.loop(0, shape.blocks)
        def _(part: Any) -> None:
            slot = wait_until_free(barriers.free, sizes.stages, step * shape.blocks + part)
            rows = pl.ds(block * shape.queries + part * sizes.q, sizes.q)
            copy(inputs.q.at[b, rows, n], memory.q.at[slot], barriers.q.at[slot])
            copy(inputs.rows.at[b, n, :, rows], memory.rows.at[slot], barriers.q.at[slot])
            if call.segment_ids:
                copy(inputs.q_ids.at[b, rows], memory.q_ids.at[slot], barriers.q.at[slot])
            copy(inputs.dout.at[b, rows, n], memory.dout.at[slot], barriers.dout.at[slot])

    steps = for_each(work.visits, call.group, fetch)
    drain(barriers.free, sizes.stages, steps * shape.blocks)


def _compute(
    call: AttentionCall,
    sizes: BlockSizes,
    shape: _Shape,
    inputs: Inputs,
    outputs: dict[str, Any],
    memory: _Memory,
    barriers: _Barriers,
    work: _Work,
) -> None:
    w = lax.axis_index("warpgroup")
    first_key = work.first_key + w * sizes.k
    # dq takes the keys of all warpgroups.
    for other in range(sizes.warps) if work.dq else [w]:
        plgpu.barrier_wait(barriers.own.at[other])
    kv_ids = None
    if call.segment_ids:
        own = pl.ds(first_key, sizes.k)
        kv_ids = plgpu.load(inputs.kv_ids.at[work.batch, own], layout=ROWS, optimized=False)

    def along_rows(row_T: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(row_T, (sizes.k, sizes.q), [1])

    def visit_part(totals: dict[str, Any], hide: bool, step: Any, block: Any, part: Any) -> None:
        number = step * shape.blocks + part
        slot = lax.rem(number, jnp.int32(sizes.stages))
        w = opaque_warpgroup()
        k_SH, v_SV = memory.k.at[w], memory.v.at[w]
        q_TH, dout_TV = memory.q.at[slot], memory.dout.at[slot]

        def weights(scores: Any) -> tuple[jax.Array, jax.Array]:
            plgpu.barrier_wait(barriers.q.at[slot])
            plgpu.wgmma(scores, k_SH, q_TH.transpose((1, 0)))
            # Products finish in issue order: with only the scores in flight, the previous block has
            # finished with its stage.
            plgpu.wgmma_wait(1)
            free_last(barriers.free, sizes.stages, number)
            x, factor = base2(call, plgpu.wgmma_accumulator_load(scores, wait_n=0))
            by_cap = slope(call, x)
            if hide:
                q_ids = None
                if call.segment_ids:
                    q_ids = plgpu.load(memory.q_ids.at[slot], layout=COLUMNS)
                position = work.offset + block * shape.queries + part * sizes.q
                ids = {"q_ids": q_ids, "kv_ids": kv_ids}
                x = masked(call, x, position, first_key, q_axis=1, keys=shape.keys, **ids)
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
            ds = (ds_by_dp * (dp_ST - along_rows(delta_T))).astype(call.dtype)
            if work.dq is not None:
                work.dq.write_ds(part, w, step, ds)
            add_product(totals["k"], ds, q_TH, memory.staging, w)

        scores = accumulator(sizes.k, sizes.q)
        p, ds_by_dp = pl.run_scoped(weights, scores)
        plgpu.barrier_wait(barriers.dout.at[slot])
        if "k" in totals:
            pl.run_scoped(partial(add_both, p, ds_by_dp), scores)
        else:
            add_product(totals["v"], p, dout_TV, memory.staging, w)

    def visit(totals: dict[str, Any], hide: bool, step: Any, member: Any, block: Any) -> None:
        @pl.loop(0, shape.blocks)
        def _(part: Any) -> None:
            visit_part(totals, hide, step, block, part)

        if work.dq is not None:
            work.dq.add_step(memory.k, opaque_warpgroup(), step, member, block)

    def all_steps(totals: dict[str, Any]) -> dict[str, jax.Array]:
        steps = for_each(work.visits, call.group, partial(visit, totals))
        if work.dq is not None:
            work.dq.finish(w, steps)
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
