"""What the kernels for dq and for dk and dv on Hopper share: operands, warpgroups, loops."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tjx_kernels.attention.masks import Blocks
from tjx_kernels.attention.types import AttentionCall

# Registers of a thread after the split, for 2 and 3 compute warpgroups: the fetching warpgroup
# gives up what it does not need. Together at most 65536 / 128 = 512.
REGISTERS = {2: (240, 24), 3: (160, 32)}


class Inputs(NamedTuple):
    """Operands of both kernels in device memory.

    Attributes
    ----------
    q, k, v, dout
        In the public layout. All lengths are lengthened to what TMA can address (`padded`).
    rows
        float32 [batch, heads, 2, q_len]: the LSE in units of log 2, and delta.
    offset
        int32 [batch], the position of the first query, where it is not static.
    q_ids, kv_ids
        int32 [batch, q_len] and [batch, kv_len], or None.
    ranges
        int32 [batch, programs, 2]: the blocks [start, stop) that share a segment with the rows
        that a program owns, or None without segments.
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


def compiler_params() -> Any:
    """Give the kernels' compiler parameters: exp2 and tanh are single instructions."""
    return plgpu.CompilerParams(approx_math=True)


def split_warpgroups(count: int, compute: Callable[[], None], fetch: Callable[[], None]) -> None:
    """Run `compute` in the first `count` warpgroups and `fetch` in the one after them."""
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
    """Consecutive blocks [start, stop) that a program visits: all masked, or none."""

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
    """Cut the blocks that a program visits into spans; all its warpgroups visit the same.

    `program` are its indices in `ranges`. `partly` says whether there can be any blocks that need
    a mask before and after those that need none: a loop that is never run is not compiled.
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
    """Run `body(hide, step, turn, block)`, each span `times` times over before the next one.

    `step` counts from 0, `turn` counts the times; gives the number of steps. The warpgroup that
    fetches and those that compute all walk this way.
    """
    done: jax.Array = jnp.int32(0)
    for span in visits:
        after = done + times * (span.stop - span.start)
        lax.fori_loop(done, after, partial(_one_step, span, body), (jnp.int32(0), span.start))
        done = after
    return done


def _one_step(span: Span, body: Any, step: Any, at: tuple[Any, Any]) -> tuple[Any, Any]:
    turn, block = at
    body(span.hide, step, turn, block)
    wraps = block + 1 == span.stop
    return jnp.where(wraps, turn + 1, turn), jnp.where(wraps, span.start, block + 1)


# --- the ring of stages ---------------------------------------------------------------------------
# Step i uses stage i % stages. A barrier of the ring counts its completions, one a use, and every
# wait is for the next of them: the warpgroups compute on a stage after the copies of that use have
# arrived, and the stage is overwritten after all of them have passed `free_last` behind that use.


def wait_until_free(free: Any, stages: int, step: Any) -> Any:
    """Wait until the step's stage may be overwritten, and give it. The first uses find it free."""
    slot = lax.rem(step, jnp.int32(stages))
    pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
    return slot


def free_last(free: Any, stages: int, step: Any) -> None:
    """Say that this warpgroup is done with what the step before this one has used."""
    last = lax.rem(step + (stages - 1), jnp.int32(stages))
    pl.when(step > 0)(lambda: plgpu.barrier_arrive(free.at[last]))


def drain(free: Any, stages: int, steps: Any) -> None:
    """Wait for what is freed without anybody fetching again; nobody frees the last step's stage.

    No barrier may end with a completion that was not waited for: JAX's interpreter checks it.
    """
    for slot in range(stages):
        owed = (steps > slot) & (lax.rem(steps + (stages - 1), jnp.int32(stages)) != slot)
        pl.when(owed)(partial(plgpu.barrier_wait, free.at[slot]))


# --- products -------------------------------------------------------------------------------------


def accumulator(rows: int, columns: int) -> Any:
    """Describe where products add up: float32, in the registers of a warpgroup, at first 0."""
    return plgpu.WGMMAAccumulatorRef((rows, columns), jnp.float32)


def opaque_warpgroup() -> Any:
    """Give the warpgroup's index within a loop's body.

    As the compiler cannot know it to be the same every time, it does not keep the descriptors that
    depend on it, 32 registers of them, alive over the loop.
    """
    index = lax.axis_index("warpgroup")
    return lax.optimization_barrier(index)  # type: ignore[no-untyped-call]  # jax has no type


def staging(call: AttentionCall, shape: tuple[int, ...]) -> Any:
    """Describe what `add_product` needs when it is interpreted: shared memory for its factor."""
    return plgpu.SMEM(shape, call.dtype) if call.interpret else None


def add_product(total: Any, factor: jax.Array, other: Any, staged: Any, warpgroup: Any) -> None:
    """Start total += factor @ other, with `factor` in registers and `other` in shared memory.

    JAX's interpreter multiplies only what lies in shared memory: there `factor` goes through it.
    """
    if staged is None:
        plgpu.wgmma(total, factor, other)
    else:
        staged[warpgroup] = factor
        commit()
        plgpu.wgmma(total, staged.at[warpgroup], other)


def commit() -> None:
    """Let TMA and tensor cores see what was written to shared memory."""
    plgpu.commit_smem()  # type: ignore[no-untyped-call]  # jax has no type for it
