"""The part of dq in the backward kernel on Hopper: dS K of a thread block's keys, added to a sum.

A thread block owns keys, so it has one of the parts whose sum over all keys is dq. Per step its
compute warpgroups exchange dS through shared memory, since the part of a query takes dS of all keys
of the thread block; each one then computes dS K for its share of the queries and adds it to a
float32 sum in device memory by TMA, which adds in the L2 cache and is not waited for.

Order of addition
-----------------
Float32 addition is not associative, and thread blocks finish in any order. With
`call.deterministic` the thread blocks of a head therefore add to a share of queries in the order of
their keys: a counter of each share counts the thread blocks that have added to it, and each one
waits for its turn.

This cannot hang if the GPU starts thread blocks in the order of their index, as NVIDIA's GPUs do
and as CUB's prefix sums and the deterministic mode of FlashAttention rely on. A thread block waits
for thread blocks of smaller index alone, since `tile_order` puts the first keys of a head first,
and the grid is not persistent. So of the thread blocks that have not ended, the one with the
smallest index has started, and whatever it waits for has ended. It ends, and by induction all do.

Under a causal mask thread block i of a head starts at the diagonal, one step after thread block
i - 1, and then follows it at a distance of about a step: it waits only at first.

Axes: B batch, T queries, S keys, N heads, H head_dim.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from tjx_kernels.attention.backends.mosaic_gpu.pipeline import Span, accumulator, commit
from tjx_kernels.attention.backends.mosaic_gpu.scores import tile
from tjx_kernels.attention.block_sizes import BlockSizes
from tjx_kernels.attention.call import AttentionCall
from tjx_kernels.attention.masks import key_blocks, row_blocks

plgpu: Any = mosaic_gpu  # JAX gives most of it no types


class Exchange(NamedTuple):
    """Shared memory of the exchange between the compute warpgroups."""

    ds: Any  # [shares of queries, warpgroups with keys, keys, queries]: dS^T
    dq: Any  # [shares of queries, queries, H] float32, copied to device memory by TMA


class ExchangeBarriers(NamedTuple):
    """Barriers of all compute warpgroups, which complete once per step and are always waited for.

    `written`: all of them have written their dS; `read`: all of them have read all dS.
    """

    written: Any
    read: Any


def exchange_memory(call: AttentionCall, sizes: BlockSizes) -> Exchange:
    """Return the types of shared memory; tiles of dS are swizzled as those of the keys."""
    return Exchange(
        ds=tile((sizes.warps, sizes.warps, sizes.k, sizes.q), call.dtype, call.head_dim),
        dq=tile((sizes.warps, sizes.q, call.head_dim), jnp.float32),
    )


def exchange_barriers(sizes: BlockSizes) -> ExchangeBarriers:
    """Return the types of the barriers."""
    barrier = plgpu.Barrier(num_arrivals=sizes.warps)
    return ExchangeBarriers(barrier, barrier)


def shares(call: AttentionCall, sizes: BlockSizes) -> int:
    """Return the number of shares of a head's queries: one per warpgroup and step."""
    return -(-call.q_len // (sizes.q * sizes.warps)) * sizes.warps


def new_counters(call: AttentionCall, sizes: BlockSizes) -> Any:
    """Return the counters of all shares, initially 0, in a kernel that adds in order."""
    number = call.batch * call.heads * shares(call, sizes)
    return pl.get_global(plgpu.SemaphoreType.REGULAR((number,))) if in_order(call) else None


def new_sum(call: AttentionCall, sizes: BlockSizes, programs: int) -> Any:
    """Return a reference to the sum, initially 0.

    It has whole steps of queries, so no copy reaches past the end of a head. In interpret mode each
    of a head's `programs` has an array of its own: see `DqPart.add`.
    """
    shape = (call.batch, shares(call, sizes) * sizes.q, call.heads, call.head_dim)
    return jax.new_ref(jnp.zeros((programs, *shape) if call.interpret else shape, jnp.float32))


def read_sum(call: AttentionCall, total: Any) -> jax.Array:
    """Return dq [B, T, N, H] from the sum."""
    dq: jax.Array = jax.freeze(total)
    dq = dq.sum(axis=0) if call.interpret else dq
    return (dq[:, : call.q_len] * call.scale).astype(call.dtype)


def in_order(call: AttentionCall) -> bool:
    """Return whether thread blocks add in a fixed order; the interpreter has no semaphores."""
    return call.deterministic and not call.interpret


def turns(
    call: AttentionCall, ranges: tuple[jax.Array, jax.Array], offset: Any, keys: int, queries: int
) -> jax.Array:
    """Return int32 [B, programs, steps]: how many earlier thread blocks of a head visit a step.

    For calls with segment ids; otherwise the visitors of a step are consecutive, and `DqPart` needs
    no table. A thread block visits the steps that `row_blocks` and `ranges` have in common.
    """
    programs, steps = -(-call.kv_len // keys), -(-call.q_len // queries)

    def visited(offset: Any, program: Any) -> tuple[jax.Array, jax.Array]:
        blocks = row_blocks(call, offset, program * keys, keys, queries)
        return jnp.int32(blocks.start), jnp.int32(blocks.stop)

    offset_B = jnp.broadcast_to(call.q_offset or 0 if offset is None else offset, (call.batch,))
    of_each = jax.vmap(jax.vmap(visited, (None, 0)), (0, None))
    start_BP, stop_BP = of_each(offset_B, jnp.arange(programs))
    start_BP, stop_BP = jnp.maximum(start_BP, ranges[0]), jnp.minimum(stop_BP, ranges[1])
    step = jnp.arange(steps)[None, None]
    visits_BPS = (start_BP[..., None] <= step) & (step < stop_BP[..., None])
    counts = visits_BPS.astype(jnp.int32)
    return jnp.cumsum(counts, axis=1) - counts


@dataclass(frozen=True)
class DqPart:
    """A thread block's part of dq.

    Attributes
    ----------
    call, sizes, memory, barriers
        The call, its block sizes, and the types above.
    total
        Reference to the sum in device memory.
    counters
        Semaphores, one for each share of queries of a head, or None.
    turns
        Result of `turns`, or None without segment ids.
    batch, kv_head, index
        Batch row, key head, and number of the thread block among those of the key head.
    offset
        Position of the first query.
    visits
        Steps of queries that the thread block visits.
    """

    call: AttentionCall
    sizes: BlockSizes
    memory: Exchange
    barriers: ExchangeBarriers
    total: Any
    counters: Any
    turns: Any
    batch: Any
    kv_head: Any
    index: Any
    offset: Any
    visits: list[Span]

    def write_ds(self, share: Any, warpgroup: Any, step: Any, ds_ST: jax.Array) -> None:
        """Write dS^T of a share of queries and the keys of a warpgroup, once it may be written."""
        pl.when((share == 0) & (step > 0))(partial(plgpu.barrier_wait, self.barriers.read))
        self.memory.ds.at[share, warpgroup][...] = ds_ST

    def add_step(self, k_WSH: Any, warpgroup: Any, step: Any, member: Any, block: Any) -> None:
        """Add dS K of a step to the sum; `member` is the query head's number in its group."""
        commit()
        plgpu.barrier_arrive(self.barriers.written)
        # The copy of the previous step was issued a step ago.
        if in_order(self.call):
            pl.when(step > 0)(partial(self.pass_turn, warpgroup, *self.before(member, block)))
        else:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_wait(self.barriers.written)

        def product(dq: Any) -> None:
            for index in range(self.sizes.warps):
                # Opaque, for the same reason as `opaque_warpgroup`.
                other = lax.optimization_barrier(jnp.int32(index))  # type: ignore[no-untyped-call]  # jax has no type
                ds_ST = self.memory.ds.at[warpgroup, other]
                plgpu.wgmma(dq, ds_ST.transpose((1, 0)), k_WSH.at[other])
            dq_TH = plgpu.wgmma_accumulator_load(dq, wait_n=0)
            plgpu.barrier_arrive(self.barriers.read)
            self.memory.dq.at[warpgroup][...] = dq_TH

        pl.run_scoped(product, accumulator(self.sizes.q, self.call.head_dim))
        commit()
        if in_order(self.call):
            self.await_turn(warpgroup, member, block)
        self.add(warpgroup, member, block)

    def finish(self, warpgroup: Any, steps: Any) -> None:
        """Wait for the last completions; then no warpgroup reads the keys any more."""

        @pl.when(steps > 0)
        def _() -> None:
            plgpu.barrier_wait(self.barriers.read)
            if in_order(self.call):
                self.pass_turn(warpgroup, self.call.group - 1, self.visits[-1].stop - 1)

    def add(self, warpgroup: Any, member: Any, block: Any) -> None:
        """Start the addition of the staged result.

        JAX's interpreter has neither reductions nor semaphores, and it reports additions of several
        thread blocks to one cell as races. There each thread block of a head copies its result to
        an array of its own, by the same asynchronous copy, and `read_sum` adds the arrays. So it
        tests everything but the addition in the L2 cache and the order of addition.
        """
        first = (block * self.sizes.warps + warpgroup) * self.sizes.q
        at: Any = (self.batch, pl.ds(first, self.sizes.q), self.head(member))
        staged = self.memory.dq.at[warpgroup]
        if self.call.interpret:
            plgpu.copy_smem_to_gmem(staged, self.total.at[(self.index, *at)])
        else:
            plgpu.copy_smem_to_gmem(staged, self.total.at[at], reduction_op="add")

    def head(self, member: Any) -> Any:
        """Return the query head of a member of the group."""
        return self.kv_head * self.call.group + member

    def before(self, member: Any, block: Any) -> tuple[Any, Any]:
        """Return the member and the block of the previous step; spans are consecutive."""
        wraps = block == self.visits[0].start
        last = jnp.where(wraps, self.visits[-1].stop, block) - 1
        return jnp.where(wraps, member - 1, member), last

    def counter(self, warpgroup: Any, member: Any, block: Any) -> Any:
        """Return the semaphore that counts the parts of a share of queries."""
        row = self.batch * self.call.heads + self.head(member)
        first = row * shares(self.call, self.sizes)
        return self.counters.at[first + block * self.sizes.warps + warpgroup]

    def await_turn(self, warpgroup: Any, member: Any, block: Any) -> None:
        """Wait until the thread blocks of earlier keys have added their parts."""
        if self.turns is None:
            queries = self.sizes.q * self.sizes.warps
            keys = self.sizes.k * self.sizes.warps
            first = key_blocks(self.call, self.offset + block * queries, queries, keys).start
            turn = self.index - first
        else:
            turn = self.turns[self.batch, self.index, block]
        counter = self.counter(warpgroup, member, block)
        plgpu.semaphore_wait(counter, turn, decrement=False, memory_scope="gpu")

    def pass_turn(self, warpgroup: Any, member: Any, block: Any) -> None:
        """Let the next thread block add, when the addition is complete and not only started."""
        plgpu.wait_smem_to_gmem(0)
        plgpu.semaphore_signal(self.counter(warpgroup, member, block), memory_scope="gpu")
