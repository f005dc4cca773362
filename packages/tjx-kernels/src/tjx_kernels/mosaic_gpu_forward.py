"""The forward pass for NVIDIA Hopper: warp-specialised flash attention with Pallas Mosaic GPU.

The structure is that of Shah et al., "FlashAttention-3", 2024, section 3. A thread block is some
compute warpgroups, each with a block of query rows of its own, and one warpgroup that copies keys
and values into rings in shared memory. Three things overlap:

- copies with everything else (the rings);
- one warpgroup's softmax with another's products: they take turns (ping-pong, 3.1);
- a warpgroup's softmax of block t with its own products: p of block t - 1 times v (3.2).

Blocks of keys are visited from the last to the first (`t` counts them): with causal attention the
last needs a mask, as the first one visited may, of which nobody knows whether all see it.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from tjx_kernels.attention_call import AttentionCall, Operands
from tjx_kernels.block_sizes import BlockSizes, Row, block_sizes
from tjx_kernels.mosaic_gpu_scores import first_position, interpret_params, padded, tile
from tjx_kernels.mosaic_gpu_softmax import Barriers, Consumer, Inputs, Shared, Visit
from tjx_kernels.mosaic_gpu_steps import compiler_params, split_warpgroups
from tjx_kernels.visibility import key_blocks, segment_blocks

plgpu: Any = mosaic_gpu  # JAX gives most of it no types


def forward(call: AttentionCall, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Compute attention and its log-sum-exp; a `Forward` without a rule for vmap."""
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
    program = Program(call, sizes)
    tiles = -(-call.q_len // rows)
    # All rows of all tiles: a warpgroup stores the LSE of its rows with one bulk copy, which is
    # clipped only at the end of the whole array. Shorter rows would spill into the next head's.
    lse_shape = (call.batch, call.heads, tiles * rows)
    out, lse = plgpu.kernel(
        program.run,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),  # type: ignore[no-untyped-call]  # as jax is
            jax.ShapeDtypeStruct(lse_shape, jnp.float32),  # type: ignore[no-untyped-call]  # same
        ),
        scratch_types=program.scratch(),
        # The last axis varies fastest: heads that share keys run at the same time.
        grid=(tiles, call.batch * call.heads),
        grid_names=("rows", "heads"),
        num_threads=sizes.warps + 1,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        interpret=interpret_params(call),
        kernel_name="flash_attention_forward",
    )(inputs)
    return out[:, : call.q_len], lse[:, :, : call.q_len]


@dataclass(frozen=True)
class Program:
    """One call's kernel. Every thread block serves the rows of `warps` compute warpgroups."""

    call: AttentionCall
    sizes: BlockSizes

    def scratch(self) -> dict[str, Any]:
        """Describe shared memory and barriers."""
        call, (rows, keys, ring, groups) = self.call, self.sizes
        ids = call.segment_ids
        shared = Shared(
            tile((groups, rows, call.head_dim), call.dtype),
            tile((ring, keys, call.head_dim), call.dtype),
            tile((ring, keys, call.head_dim), call.dtype),
            plgpu.SMEM((groups, rows), jnp.float32),
            plgpu.SMEM((groups, rows), jnp.int32) if ids else None,
            plgpu.SMEM((ring, keys), jnp.int32) if ids else None,
        )
        # Each copy arrives once at its barrier; segment ids come together with their rows.
        copies = 2 if ids else 1
        free = plgpu.Barrier(num_arrivals=groups, num_barriers=ring)
        barriers = Barriers(
            plgpu.Barrier(num_arrivals=copies, num_barriers=groups),
            plgpu.Barrier(num_arrivals=copies, num_barriers=ring),
            plgpu.Barrier(num_barriers=ring),
            free,
            free,
            plgpu.Barrier(num_barriers=groups),
        )
        return {"shared": shared, "barriers": barriers}

    def run(
        self, inputs: Inputs, out_BTNH: Any, lse_BNT: Any, *, shared: Any, barriers: Any
    ) -> None:
        """Divide the work among the warpgroups of a thread block."""
        call, (rows, keys, _, groups) = self.call, self.sizes
        head_of_all, heads = lax.axis_index("heads"), jnp.int32(call.heads)
        batch, head = lax.div(head_of_all, heads), lax.rem(head_of_all, heads)
        # Thread blocks start in this order, and with causal attention the last rows have most to
        # do: started first, they do not keep the others waiting at the end.
        index = -(-call.q_len // (rows * groups)) - 1 - lax.axis_index("rows")
        position = first_position(call, inputs.offset, batch) + index * (rows * groups)
        # Opaque: LLVM would derive more loop counters from a known offset than there are registers
        # (head_dim 256).
        position = lax.optimization_barrier(position)  # type: ignore[no-untyped-call]  # as jax is

        # All warpgroups visit the same blocks, so that the arrivals at the barriers are the same
        # numbers for all: what only some of them see is masked for the others.
        seen = key_blocks(call, position, rows * groups, keys)
        start, stop = seen.start, seen.stop
        if inputs.ranges is not None:
            start = jnp.maximum(start, inputs.ranges[batch, index, 0])
            stop = jnp.minimum(stop, inputs.ranges[batch, index, 1])
        # At least one block, wholly masked where nothing is seen: dead rows need no path of their
        # own.
        start = jnp.minimum(start, -(-call.kv_len // keys) - 1)
        visit = Visit(batch, head, index, position, start, jnp.maximum(stop, start + 1))

        def compute() -> None:
            group = lax.axis_index("warpgroup")
            Consumer(call, self.sizes, inputs, shared, barriers, visit, group).run(
                out_BTNH, lse_BNT
            )

        split_warpgroups(groups, compute, lambda: self.copy(inputs, shared, barriers, visit))

    def copy(self, inputs: Inputs, shared: Shared, barriers: Barriers, visit: Visit) -> None:
        """Copy keys and values into the rings, in the order in which they are used."""
        keys, ring = self.sizes.k, self.sizes.stages
        head = lax.div(visit.head, jnp.int32(self.call.group))
        number = visit.stop - visit.start

        @pl.loop(0, number)
        def _(t: Any) -> None:
            slot = lax.rem(t, jnp.int32(ring))
            span = pl.ds((visit.stop - 1 - t) * keys, keys)

            # A slot is free at first; later its last reader has to be waited for.
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

        # Every arrival is waited for, which interpret mode checks.
        @pl.loop(jnp.maximum(number - ring, 0), number)
        def _(t: Any) -> None:
            slot = lax.rem(t, jnp.int32(ring))
            plgpu.barrier_wait(barriers.k_free.at[slot])
            plgpu.barrier_wait(barriers.v_free.at[slot])
