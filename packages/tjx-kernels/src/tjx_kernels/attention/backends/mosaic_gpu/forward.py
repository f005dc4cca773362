"""Forward pass on NVIDIA Hopper: warp-specialized flash attention with Pallas Mosaic GPU.

The structure is that of Shah et al., "FlashAttention-3", 2024, section 3. A thread block has a few
compute warpgroups with a block of query rows each, and one warpgroup that copies queries, keys and
values into ring buffers in shared memory. One persistent thread block per processor processes tiles
in the order of `tile_order`. These overlap:

- copies with everything else, including those for the next tile;
- the softmax of one warpgroup with the products of another (ping-pong scheduling, 3.1);
- a warpgroup's softmax of block t with its own product of p of block t - 1 and v (3.2).

Blocks of keys are visited from the last to the first (`t` counts them): the first visited block
always applies the mask, which a causal mask needs there.

Tile model
----------
An estimate: no GPU has run this kernel. A tile of R query rows against n blocks of X keys takes

    n * 4 R X head_dim / (e * 989e12 / 132) seconds + 0.8 us,

where 989 TFLOP/s is the dense bfloat16 peak of the 132 processors of an H100. Two numbers are
assumed: 0.8 us for what does not overlap between tiles, and e, the share of the peak within the
loop over keys, as large as that of cuDNN at 16k tokens (0.68 for head_dim 128, 0.56 for 64). The
kernel takes as long as its busiest thread block, plus 3 us to start. With the block sizes of the
table, causal, 16k tokens in all and heads * head_dim = 2048, in TFLOP/s, and as a share of cuDNN's
measured 448, 595, 645 (head_dim 128) and 311, 468, 538 (64) on an H100:

    tokens        1k            4k            16k
    head_dim 128  511 (1.14)    610 (1.03)    641 (0.99)
    head_dim 64   320 (1.03)    459 (0.98)    504 (0.94)

The shares are those of an inner loop that is as good as cuDNN's; one that is 10 % slower gives at
least 0.85. This requires sections that fit the L2 cache: see `tile_order` for the limit without
them.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from tjx_kernels.attention.backends.mosaic_gpu.online_softmax import (
    Barriers,
    Consumer,
    Inputs,
    Shared,
    Visit,
)
from tjx_kernels.attention.backends.mosaic_gpu.pipeline import (
    compiler_params,
    opaque_warpgroup,
    split_warpgroups,
)
from tjx_kernels.attention.backends.mosaic_gpu.scores import (
    first_position,
    interpret_params,
    padded,
    tile,
)
from tjx_kernels.attention.backends.mosaic_gpu.tile_order import PROCESSORS, TileOrder, tile_order
from tjx_kernels.attention.block_sizes import BlockSizes, Row, block_sizes
from tjx_kernels.attention.call import AttentionCall, Operands
from tjx_kernels.attention.masks import key_blocks, segment_blocks

plgpu: Any = mosaic_gpu  # JAX gives most of it no types

# Shared memory of a thread block (227 KiB) without barriers and small buffers.
SHARED_BYTES = 220 * 2**10


def forward(call: AttentionCall, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Compute attention and its log-sum-exp; a `Forward` without a batching rule."""
    architecture = "interpret" if call.interpret else call.architecture
    row = Row("mosaic_gpu", architecture, call.head_dim, call.causal, "forward")
    sizes = block_sizes(row)
    rows = sizes.q * sizes.warps
    q, k, v = (padded(x) for x in (operands.q, operands.k, operands.v))
    inputs = Inputs(q, k, v, operands.q_offset)
    if operands.q_segment_ids is not None and operands.kv_segment_ids is not None:
        ids = operands.q_segment_ids, operands.kv_segment_ids
        ranges = jnp.stack(segment_blocks(*ids, rows, sizes.k), axis=-1)
        q_ids, kv_ids = (padded(x) for x in ids)
        inputs = inputs._replace(q_ids=q_ids, kv_ids=kv_ids, ranges=ranges)
    tiles = -(-call.q_len // rows)
    streamed = 2 * call.kv_len * call.head_dim * k.dtype.itemsize
    order = tile_order(call, tiles, call.heads, streamed, last_first=call.causal)
    program = Program(call, sizes, order, min(PROCESSORS[architecture], order.total))
    # Padded to whole tiles: a warpgroup stores its LSE with one bulk copy, which is clipped only at
    # the end of the whole array. An unpadded row would overflow into the next head's.
    lse_shape = (call.batch, call.heads, tiles * rows)
    out, lse = plgpu.kernel(
        program.run,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),  # type: ignore[no-untyped-call]  # as jax is
            jax.ShapeDtypeStruct(lse_shape, jnp.float32),  # type: ignore[no-untyped-call]  # same
        ),
        scratch_types=program.scratch(),
        grid=(program.programs,),
        grid_names=("program",),
        num_threads=sizes.warps + 1,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        interpret=interpret_params(call),
        kernel_name="flash_attention_forward",
    )(inputs)
    return out[:, : call.q_len], lse[:, :, : call.q_len]


@dataclass(frozen=True)
class Program:
    """Kernel of one call: persistent thread blocks that process tiles of `q * warps` rows."""

    call: AttentionCall
    sizes: BlockSizes
    order: TileOrder
    programs: int

    @property
    def buffers(self) -> int:
        """Query tiles in shared memory: 2 (double buffering) if they fit, else 1."""
        call, (rows, keys, ring, groups) = self.call, self.sizes
        column = call.head_dim * jnp.dtype(call.dtype).itemsize
        both = (2 * rows * groups + 2 * ring * keys) * column
        return 2 if both <= SHARED_BYTES else 1

    @property
    def pairs(self) -> bool:
        """Whether a thread block processes pairs of tiles with equal total work."""
        return self.call.causal

    def scratch(self) -> dict[str, Any]:
        """Return the types of shared memory and barriers."""
        call, (rows, keys, ring, groups) = self.call, self.sizes
        ids, queries = call.segment_ids, groups * self.buffers
        shared = Shared(
            tile((queries, rows, call.head_dim), call.dtype),
            tile((ring, keys, call.head_dim), call.dtype),
            tile((ring, keys, call.head_dim), call.dtype),
            plgpu.SMEM((groups, rows), jnp.float32),
            plgpu.SMEM((queries, rows), jnp.int32) if ids else None,
            plgpu.SMEM((ring, keys), jnp.int32) if ids else None,
        )
        # Each copy arrives once at its barrier; segment ids share the barrier of their rows.
        copies = 2 if ids else 1
        free = plgpu.Barrier(num_arrivals=groups, num_barriers=ring)
        barriers = Barriers(
            plgpu.Barrier(num_arrivals=copies, num_barriers=queries),
            plgpu.Barrier(num_arrivals=copies, num_barriers=ring),
            plgpu.Barrier(num_barriers=ring),
            plgpu.Barrier(num_barriers=queries),
            free,
            free,
            plgpu.Barrier(num_barriers=groups),
        )
        return {"shared": shared, "barriers": barriers}

    def run(
        self, inputs: Inputs, out_BTNH: Any, lse_BNT: Any, *, shared: Any, barriers: Any
    ) -> None:
        """Run the compute and copy warpgroups of a thread block."""

        def compute() -> None:
            def one_tile(turn: Any, place: Any, before: Any) -> Any:
                group = opaque_warpgroup()
                visit = self.visit(inputs, turn, place, before)
                consumer = Consumer(self.call, self.sizes, inputs, shared, barriers, visit, group)
                consumer.run(out_BTNH, lse_BNT, lambda: self.located(place))
                return before + visit.number

            self.order.for_each(self.programs, self.pairs, one_tile, jnp.int32(0))

        split_warpgroups(self.sizes.warps, compute, lambda: self.fetch(inputs, shared, barriers))

    def located(self, place: Any) -> tuple[Any, Any, Any]:
        """Return the batch row, head and index of a tile."""
        (head, index), heads = place(), jnp.int32(self.call.heads)
        return lax.div(head, heads), lax.rem(head, heads), index

    def visit(self, inputs: Inputs, turn: Any, place: Any, before: Any) -> Visit:
        """Return the blocks of keys that a tile visits, after `before` blocks of earlier tiles."""
        call, (rows, keys, _, groups) = self.call, self.sizes
        batch, head, index = self.located(place)
        position = first_position(call, inputs.offset, batch) + index * (rows * groups)
        # Opaque: otherwise LLVM derives loop counters from known values and runs out of registers
        # (head_dim 256).
        position, before = lax.optimization_barrier((position, before))  # type: ignore[no-untyped-call]  # as jax is

        # All warpgroups visit the same blocks, for equal numbers of barrier arrivals; blocks that
        # only some of them need are masked for the others.
        seen = key_blocks(call, position, rows * groups, keys)
        start, stop = seen.start, seen.stop
        if inputs.ranges is not None:
            start = jnp.maximum(start, inputs.ranges[batch, index, 0])
            stop = jnp.minimum(stop, inputs.ranges[batch, index, 1])
        # At least one block, fully masked for dead rows: they need no separate path.
        start = jnp.minimum(start, -(-call.kv_len // keys) - 1)
        buffer = lax.rem(turn, jnp.int32(self.buffers)) * groups
        return Visit(
            batch, head, index, position, start, jnp.maximum(stop, start + 1), before, buffer
        )

    def fetch(self, inputs: Inputs, shared: Shared, barriers: Barriers) -> None:
        """Copy queries, keys and values into shared memory in the order of use."""
        ring, groups = self.sizes.stages, self.sizes.warps

        def one_tile(turn: Any, place: Any, before: Any) -> Any:
            visit = self.visit(inputs, turn, place, before)
            for group in range(groups):
                self.copy_queries(inputs, shared, barriers, visit, turn, group)
            self.copy_keys(inputs, shared, barriers, visit)
            return before + visit.number

        turns, steps = self.order.for_each(self.programs, self.pairs, one_tile, jnp.int32(0))

        # Wait for every arrival; interpret mode checks this.
        @pl.loop(jnp.maximum(steps - ring, 0), steps)
        def _(t: Any) -> None:
            slot = lax.rem(t, jnp.int32(ring))
            plgpu.barrier_wait(barriers.k_free.at[slot])
            plgpu.barrier_wait(barriers.v_free.at[slot])

        @pl.loop(jnp.maximum(turns - self.buffers, 0), turns)
        def _(turn: Any) -> None:
            buffer = lax.rem(turn, jnp.int32(self.buffers)) * groups
            for group in range(groups):
                plgpu.barrier_wait(barriers.q_free.at[buffer + group])

    def copy_queries(
        self,
        inputs: Inputs,
        shared: Shared,
        barriers: Barriers,
        visit: Visit,
        turn: Any,
        group: int,
    ) -> None:
        """Copy the queries of one compute warpgroup."""
        place = visit.buffer + group

        @pl.when(turn >= self.buffers)
        def _() -> None:
            plgpu.barrier_wait(barriers.q_free.at[place])

        rows = self.sizes.q
        span = pl.ds((visit.index * self.sizes.warps + group) * rows, rows)
        arrived = barriers.q.at[place]
        plgpu.copy_gmem_to_smem(
            inputs.q.at[visit.batch, span, visit.head], shared.q.at[place], arrived
        )
        if inputs.q_ids is not None:
            source = inputs.q_ids.at[visit.batch, span]
            plgpu.copy_gmem_to_smem(source, shared.q_ids.at[place], arrived)

    def copy_keys(self, inputs: Inputs, shared: Shared, barriers: Barriers, visit: Visit) -> None:
        """Copy the keys and values of a tile into the rings."""
        keys, ring = self.sizes.k, self.sizes.stages
        head = lax.div(visit.head, jnp.int32(self.call.group))

        @pl.loop(visit.before, visit.before + visit.number)
        def _(t: Any) -> None:
            slot = lax.rem(t, jnp.int32(ring))
            span = pl.ds((visit.stop - 1 - (t - visit.before)) * keys, keys)

            # A slot is initially free; later wait for its last reader.
            @pl.when(t >= ring)
            def _() -> None:
                plgpu.barrier_wait(barriers.k_free.at[slot])

            arrived = barriers.k.at[slot]
            source = inputs.k.at[visit.batch, span, head]
            plgpu.copy_gmem_to_smem(source, shared.k.at[slot], arrived)
            if inputs.kv_ids is not None:
                source = inputs.kv_ids.at[visit.batch, span]
                plgpu.copy_gmem_to_smem(source, shared.kv_ids.at[slot], arrived)

            @pl.when(t >= ring)
            def _() -> None:
                plgpu.barrier_wait(barriers.v_free.at[slot])

            source = inputs.v.at[visit.batch, span, head]
            plgpu.copy_gmem_to_smem(source, shared.v.at[slot], barriers.v.at[slot])
