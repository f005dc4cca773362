"""Warp specialization, block loops and stage pipeline of the Hopper kernels."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tjx_kernels.attention.call import AttentionCall
from tjx_kernels.attention.masks import Blocks

# Registers per thread of the compute and the copy warpgroups, for 2 and 3 compute warpgroups. The
# total over warpgroups is at most 65536 / 128 = 512.
REGISTERS = {2: (240, 32), 3: (160, 32)}


class Inputs(NamedTuple):
    """Operands of the backward kernels in device memory.

    Attributes
    ----------
    q, k, v, dout
        In the public layout, with lengths padded to what TMA can address (`padded`).
    rows
        float32 [batch, heads, 2, q_len]: the LSE in units of log 2, and delta.
    offset
        int32 [batch], position of the first query, if it is traced.
    q_ids, kv_ids
        int32 [batch, q_len] and [batch, kv_len], or None.
    ranges
        int32 [batch, programs, 2]: blocks [start, stop) that share a segment with the rows of a
        program; None without segment ids.
    turns
        int32 [batch, programs, blocks]: how many earlier programs visit a block; None unless
        programs add in order to blocks by segment.
    """

    q: Any
    k: Any
    v: Any
    dout: Any
    rows: Any
    offset: Any = None
    q_ids: Any = None
    kv_ids: Any = None
    ranges: Any = None
    turns: Any = None


def compiler_params() -> Any:
    """Return compiler parameters under which exp2 and tanh are single instructions."""
    return plgpu.CompilerParams(approx_math=True)


def split_warpgroups(count: int, compute: Callable[[], None], fetch: Callable[[], None]) -> None:
    """Run `compute` in the first `count` warpgroups and `fetch` in the next one."""
    index = lax.axis_index("warpgroup")
    for_compute, for_fetch = REGISTERS[count]

    @pl.when(index < count)
    def _() -> None:
        plgpu.set_max_registers(for_compute, action="increase")
        compute()

    @pl.when(index == count)
    def _() -> None:
        plgpu.set_max_registers(for_fetch, action="decrease")
        fetch()


class Span(NamedTuple):
    """Consecutive blocks [start, stop) of a program, all masked (`hide`) or all unmasked."""

    start: Any
    stop: Any
    hide: bool


def spans(
    call: AttentionCall,
    blocks: Blocks,
    ranges_BP2: Any,
    program: tuple[Any, Any],
    partly: tuple[bool, bool],
) -> list[Span]:
    """Divide the blocks of a program into spans; all its warpgroups visit the same blocks.

    `program` is its index in `ranges`. `partly` states whether masked blocks can occur before and
    after the unmasked ones; a loop that cannot run is not compiled.
    """
    start, stop = jnp.int32(blocks.start), jnp.int32(blocks.stop)
    if call.segment_ids:
        start = jnp.maximum(start, ranges_BP2[*program, 0])
        stop = jnp.minimum(stop, ranges_BP2[*program, 1])
        return [Span(start, jnp.maximum(start, stop), hide=True)]
    low = jnp.int32(blocks.full_start) if partly[0] else start
    high = jnp.int32(blocks.full_stop) if partly[1] else stop
    before = [Span(start, low, hide=True)] if partly[0] else []
    after = [Span(high, stop, hide=True)] if partly[1] else []
    return [*before, Span(low, high, hide=False), *after]


def for_each(
    visits: list[Span], times: int, body: Callable[[bool, Any, Any, Any], None]
) -> jax.Array:
    """Run `body(hide, step, repeat, block)` over all spans, `times` times.

    `step` counts all iterations, `repeat` the repetitions. All warpgroups iterate in the same
    order. Returns the number of steps.
    """

    def once(repeat: Any, done: Any) -> Any:
        for span in visits:
            after = done + span.stop - span.start
            lax.fori_loop(done, after, partial(_one_step, span, body, repeat), span.start)
            done = after
        return done

    steps: jax.Array = lax.fori_loop(0, times, once, jnp.int32(0))
    return steps


def _one_step(span: Span, body: Any, repeat: Any, step: Any, block: Any) -> Any:
    body(span.hide, step, repeat, block)
    return block + 1


# --- stages ---------------------------------------------------------------------------------------
# Step i uses stage i % stages. A barrier completes once per use, and each wait is for the next
# completion: warpgroups read a stage after its copies have arrived, and the copy warpgroup
# overwrites it after all of them have called `free_last` for that use.


def wait_until_free(free: Any, stages: int, step: Any) -> Any:
    """Wait until the stage of a step may be overwritten and return it; initially all are free."""
    slot = lax.rem(step, jnp.int32(stages))
    pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
    return slot


def free_last(free: Any, stages: int, step: Any) -> None:
    """Signal that this warpgroup has finished with the stage of the previous step."""
    last = lax.rem(step + (stages - 1), jnp.int32(stages))
    pl.when(step > 0)(lambda: plgpu.barrier_arrive(free.at[last]))


def drain(free: Any, stages: int, steps: Any) -> None:
    """Wait for the remaining completions of `free`; the last step's stage is never freed.

    JAX's interpreter checks that every completion of a barrier was waited for.
    """
    for slot in range(stages):
        owed = (steps > slot) & (lax.rem(steps + (stages - 1), jnp.int32(stages)) != slot)
        pl.when(owed)(partial(plgpu.barrier_wait, free.at[slot]))


# --- products -------------------------------------------------------------------------------------


def accumulator(rows: int, columns: int) -> Any:
    """Return the type of a float32 accumulator in the registers of a warpgroup, initially 0."""
    return plgpu.WGMMAAccumulatorRef((rows, columns), jnp.float32)


def opaque_warpgroup() -> Any:
    """Return the index of the warpgroup, opaque to the compiler.

    In a loop body this keeps the compiler from holding descriptors that depend on it in 32
    registers across iterations.
    """
    index = lax.axis_index("warpgroup")
    return lax.optimization_barrier(index)  # type: ignore[no-untyped-call]  # jax has no type


def staging(call: AttentionCall, shape: tuple[int, ...]) -> Any:
    """Return the shared memory that `add_product` needs in interpret mode, else None."""
    return plgpu.SMEM(shape, call.dtype) if call.interpret else None


def add_product(total: Any, factor: jax.Array, other: Any, staged: Any, warpgroup: Any) -> None:
    """Start total += factor @ other, with `factor` in registers and `other` in shared memory.

    JAX's interpreter multiplies shared-memory operands only, so there `factor` is staged.
    """
    if staged is None:
        plgpu.wgmma(total, factor, other)
    else:
        staged[warpgroup] = factor
        commit()
        plgpu.wgmma(total, staged.at[warpgroup], other)


def commit() -> None:
    """Make writes to shared memory visible to TMA and tensor cores."""
    plgpu.commit_smem()  # type: ignore[no-untyped-call]  # jax has no type for it
