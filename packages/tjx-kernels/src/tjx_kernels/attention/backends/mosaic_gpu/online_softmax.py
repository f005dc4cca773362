"""The compute warpgroups of the forward pass on Hopper: products and softmax of their rows.

What overlaps with what is said in `mosaic_gpu_forward`. Axes: M rows of queries of a warpgroup, X
keys of a block, H head_dim. `t` counts the blocks of keys in the order in which they are visited.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from tjx_kernels.attention.backends.mosaic_gpu.scores import COLUMNS, ROWS, base2, masked
from tjx_kernels.attention.block_sizes import BlockSizes
from tjx_kernels.attention.masks import key_blocks
from tjx_kernels.attention.types import AttentionCall

plgpu: Any = mosaic_gpu  # JAX gives most of it no types


class Inputs(NamedTuple):
    """The kernel's operands in device memory, lengthened as `padded` does."""

    q: Any  # [B, T, N, H]
    k: Any  # [B, S, K, H]
    v: Any
    offset: Any = None  # [B]
    q_ids: Any = None  # [B, T]
    kv_ids: Any = None  # [B, S]
    ranges: Any = None  # [B, blocks of rows, 2]: blocks of keys that share a segment with the rows


class Shared(NamedTuple):
    """Shared memory of W compute warpgroups, with rings of R blocks of keys."""

    q: Any  # [B * W, M, H]: queries in B buffers, at the end of a tile its output
    k: Any  # [R, X, H]
    v: Any
    lse: Any  # [W, M]
    q_ids: Any  # [B * W, M]
    kv_ids: Any  # [R, X]


class Barriers(NamedTuple):
    """What the warpgroups wait for.

    A slot of a ring is filled, waited for by every compute warpgroup (`k`, `v`), given up by every
    one of them once its last product with it is done (`k_free`, `v_free`: as many arrivals), and
    only then filled again: nothing is overwritten while it is read, and no barrier completes twice
    before everyone has seen it complete once. `turn` passes round the compute warpgroups, from 0
    on; nobody waits for anything while it is its turn. A block is copied once products of earlier
    blocks are done, and they needed only blocks copied before: nobody waits in a circle.
    """

    q: Any  # [B * W]: a warpgroup's queries have arrived
    k: Any  # [R]: a block of keys (and their segment ids) has arrived
    v: Any  # [R]
    q_free: Any  # [B * W]: the output has been read from the buffer
    k_free: Any  # [R]
    v_free: Any  # [R]
    turn: Any  # [W]: a warpgroup may issue its products


class Visit(NamedTuple):
    """One tile of a thread block."""

    batch: Any
    head: Any
    index: Any  # of its block of rows
    position: Any  # of its first row
    start: Any  # blocks of keys [start, stop)
    stop: Any
    before: Any  # blocks of keys that the thread block visited for earlier tiles
    buffer: Any  # of queries, for warpgroup 0

    @property
    def number(self) -> Any:
        """Number of blocks of keys."""
        return self.stop - self.start


class Softmax(NamedTuple):
    """The running softmax of a warpgroup's rows.

    `out` is the sum of p v over the blocks before the last one visited, whose `p` is still to be
    multiplied. `total` and `p` are relative to the maximum `top` of the base-2 scores, `out` is so
    once it is multiplied with `rescale`.
    """

    out: Any  # float32 [M, H]
    rescale: Any  # float32 [M]
    top: Any  # float32 [M]
    total: Any  # float32 [M]
    p: Any  # [M, X]


@dataclass(frozen=True)
class Consumer:
    """One compute warpgroup and its rows."""

    call: AttentionCall
    sizes: BlockSizes
    inputs: Inputs
    shared: Shared
    barriers: Barriers
    visit: Visit
    group: Any

    @property
    def place(self) -> Any:
        """Where the queries are in shared memory."""
        return self.visit.buffer + self.group

    def slot(self, t: Any) -> Any:
        """Return where block t is in the rings."""
        return lax.rem(self.visit.before + t, jnp.int32(self.sizes.stages))

    def run(self, out_BTNH: Any, lse_BNT: Any, located: Any) -> None:
        """Visit all blocks of keys and write the results.

        `located()` returns the batch row, the head and the index of the tile.
        """
        mine = self.shared.q.at[self.place]
        plgpu.barrier_wait(self.barriers.q.at[self.place])
        state = self.visit_all()

        out_MH = self.last(state)
        dead_M = state.total == 0
        inverse_M = 1 / jnp.where(dead_M, 1.0, state.total)
        # The queries' tile is free: all products with it are done.
        mine[...] = (out_MH * _wide(inverse_M, out_MH)).astype(self.call.dtype)
        lse_M = (state.top + jnp.log2(jnp.where(dead_M, 1.0, state.total))) * math.log(2)
        self.shared.lse.at[self.group][...] = jnp.where(dead_M, -jnp.inf, lse_M)
        plgpu.commit_smem()  # before TMA reads what was written
        batch, head, index = located()
        span = pl.ds((index * self.sizes.warps + self.group) * self.sizes.q, self.sizes.q)
        plgpu.copy_smem_to_gmem(mine, out_BTNH.at[batch, span, head])
        lse_span = lse_BNT.at[batch, head, span]
        plgpu.copy_smem_to_gmem(self.shared.lse.at[self.group], lse_span)
        # Once TMA has read the results, the next queries may be copied to their place.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(self.barriers.q_free.at[self.place])

    def visit_all(self) -> Softmax:
        """Visit the blocks; the last one's p v remains to be added."""
        call, visit, (_, keys, _, _) = self.call, self.visit, self.sizes
        number = visit.number
        own = key_blocks(call, visit.position + self.group * self.sizes.q, self.sizes.q, keys)
        whole = (0, 0) if call.segment_ids else (own.full_start, own.full_stop)
        # Blocks [full_start, full_stop) need no mask: those are the times [left, right).
        left = jnp.clip(visit.stop - whole[1], 1, number)
        right = jnp.clip(visit.stop - whole[0], left, number)
        placed = call.causal or call.window is not None

        state = self.first(masks=placed or call.segment_ids or call.kv_len % keys != 0)
        if call.segment_ids:
            return self.loop(1, number, state, masks=True)
        if call.causal:  # otherwise only the last block can have keys that come too late
            state = self.loop(1, left, state, masks=True)
        state = self.loop(left if call.causal else 1, right, state, masks=False)
        if call.window is not None:
            state = self.loop(right, number, state, masks=True)
        return state

    def loop(self, start: Any, stop: Any, state: Softmax, *, masks: bool) -> Softmax:
        """Visit blocks start, ..., stop - 1."""
        result: Softmax = lax.fori_loop(start, stop, partial(self.step, masks=masks), state)
        return result

    def first(self, *, masks: bool) -> Softmax:
        """Visit the first block, before which there is nothing to multiply."""
        rows, head_dim = self.sizes.q, self.call.head_dim
        slot = self.slot(0)
        plgpu.barrier_wait(self.barriers.k.at[slot])
        # The first turn is warpgroup 0's, who waits for this one's end in `last`.
        pl.when(self.group > 0)(self.await_turn)

        def products(scores_ref: Any) -> Any:
            plgpu.wgmma(scores_ref, *self.score_operands(slot))
            self.pass_turn()
            return scores_ref[...]

        raw_MX = pl.run_scoped(products, self.score_type())
        row = partial(jnp.full, (rows,), dtype=jnp.float32)
        empty = Softmax(
            plgpu.layout_cast(jnp.zeros((rows, head_dim), jnp.float32), plgpu.Layout.WGMMA),
            None,
            plgpu.layout_cast(row(-jnp.inf), ROWS),
            plgpu.layout_cast(row(0.0), ROWS),
            None,
        )
        return self.rounded(self.softmax(raw_MX, jnp.int32(0), slot, empty, masks=masks))

    def step(self, t: Any, state: Softmax, *, masks: bool) -> Softmax:
        """Visit block t: its scores and softmax, and the block before's p v at the same time."""
        slot, before = self.slot(t), self.slot(t - 1)
        plgpu.barrier_wait(self.barriers.k.at[slot])
        plgpu.barrier_wait(self.barriers.v.at[before])
        ready = self.rescaled(state)
        if self.call.interpret:
            found = self.overlapped_in_order(t, slot, before, ready, masks=masks)
        else:
            found = self.overlapped(t, slot, before, ready, masks=masks)
        plgpu.barrier_arrive(self.barriers.v_free.at[before])
        return self.rounded(found)

    def overlapped(self, t: Any, slot: Any, before: Any, state: Softmax, *, masks: bool) -> Softmax:
        """Do the softmax of block t while the tensor cores add the block before's p v."""
        rows, keys = self.sizes.q, self.sizes.k

        def products(refs: Any) -> None:
            out_ref, *softmax_refs = refs

            def scores(scores_ref: Any) -> Softmax:
                self.await_turn()
                plgpu.wgmma(scores_ref, *self.score_operands(slot))
                plgpu.wgmma(out_ref, state.p, self.shared.v.at[before])
                self.pass_turn()
                # The scores alone: one product may be in flight still.
                raw_MX = plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)
                return self.softmax(raw_MX, t, slot, state, masks=masks)

            new = pl.run_scoped(scores, self.score_type())
            for ref, x in zip(softmax_refs, new[1:], strict=True):
                ref[...] = x

        # What `products` assigns to its references is the result; it waits for the product.
        # (p is float32 until then: its registers are not those that the product reads.)
        new_p_MX = plgpu.layout_cast(jnp.zeros((rows, keys), jnp.float32), plgpu.Layout.WGMMA)
        start = (plgpu.ACC.init(state.out), *state[1:4], new_p_MX)
        return Softmax(*pl.run_state(products)(start))

    def overlapped_in_order(
        self, t: Any, slot: Any, before: Any, state: Softmax, *, masks: bool
    ) -> Softmax:
        """Do what `overlapped` does where `run_state` and wgmma from registers are not known."""

        def scores(scores_ref: Any) -> jax.Array:
            self.await_turn()
            plgpu.wgmma(scores_ref, *self.score_operands(slot))
            self.pass_turn()
            raw_MX: jax.Array = scores_ref[...]
            return raw_MX

        raw_MX = pl.run_scoped(scores, self.score_type())
        new = self.softmax(raw_MX, t, slot, state, masks=masks)
        return new._replace(out=self.accumulate(state, before))

    def rescaled(self, state: Softmax) -> Softmax:
        """Bring the output to the maximum that p is relative to."""
        out_MH = state.out * _wide(state.rescale, state.out)
        return state._replace(out=out_MH)

    def last(self, state: Softmax) -> jax.Array:
        """Add the last block's p v, which gives the sum over all blocks."""
        pl.when(self.group == 0)(self.await_turn)
        slot = self.slot(self.visit.number - 1)
        plgpu.barrier_wait(self.barriers.v.at[slot])
        out_MH = self.accumulate(self.rescaled(state), slot)
        plgpu.barrier_arrive(self.barriers.v_free.at[slot])
        return out_MH

    def accumulate(self, state: Softmax, slot: Any) -> jax.Array:
        """Add p v, and nothing else at the same time."""
        v_XH = self.shared.v.at[slot]
        if self.call.interpret:
            product: jax.Array = jnp.dot(state.p, v_XH[...], preferred_element_type=jnp.float32)
            plgpu.commit_smem()  # between a plain read and the next copy; wgmma needs none
            total: jax.Array = state.out + product
            return total
        start = plgpu.ACC.init(state.out)
        result: jax.Array = pl.run_state(lambda ref: plgpu.wgmma(ref, state.p, v_XH))(start)
        return result

    def softmax(self, raw_MX: Any, t: Any, slot: Any, state: Softmax, *, masks: bool) -> Softmax:
        """Find p of block t; `out` is passed on as it is, `rescale` says what it lacks."""
        x_MX, factor = base2(self.call, raw_MX)
        ids: dict[str, Any] = {}
        if self.call.segment_ids:
            q_ids, kv_ids = self.shared.q_ids.at[self.place], self.shared.kv_ids.at[slot]
            ids["q_ids"] = plgpu.load(q_ids, layout=ROWS)
            ids["kv_ids"] = plgpu.load(kv_ids, layout=COLUMNS)
            # Plain reads have to be ordered before the next copy; wgmma's are once it is done.
            plgpu.commit_smem()
        plgpu.barrier_arrive(self.barriers.k_free.at[slot])
        if masks:
            first_key = (self.visit.stop - 1 - t) * self.sizes.k
            position = self.visit.position + self.group * self.sizes.q
            x_MX = masked(self.call, x_MX, position, first_key, q_axis=0, **ids)
        top_M = jnp.maximum(state.top, jnp.max(x_MX, axis=1) * factor)
        # Rows that have seen nothing yet: -inf - -inf would be NaN.
        shift_M = jnp.where(top_M == -jnp.inf, 0.0, top_M) if masks else top_M
        rescale_M = jnp.exp2(state.top - shift_M)
        p_MX = jnp.exp2(x_MX * factor - _wide(shift_M, x_MX))
        total_M = state.total * rescale_M + jnp.sum(p_MX, axis=1)
        return Softmax(state.out, rescale_M, top_M, total_M, p_MX)

    def rounded(self, state: Softmax) -> Softmax:
        """Bring p into the dtype in which it is multiplied."""
        # Here and no later: else the compiler may convert between the two products of the next
        # block, which would then run one after the other.
        p = lax.optimization_barrier(state.p.astype(self.call.dtype))  # type: ignore[no-untyped-call]  # as jax is
        return state._replace(p=p)

    def score_type(self) -> Any:
        """Describe the accumulator of a tile of scores, which starts at 0."""
        return plgpu.ACC((self.sizes.q, self.sizes.k), jnp.float32)

    def score_operands(self, slot: Any) -> tuple[Any, Any]:
        """Give q and k^T."""
        return self.shared.q.at[self.place], self.shared.k.at[slot].transpose((1, 0))

    def await_turn(self) -> None:
        """Wait until the warpgroup before has issued its products, to issue ours after them."""
        if self.sizes.warps > 1:
            plgpu.barrier_wait(self.barriers.turn.at[self.group])

    def pass_turn(self) -> None:
        """Let the warpgroup after this one issue its products."""
        if self.sizes.warps > 1:
            following = lax.rem(self.group + 1, jnp.int32(self.sizes.warps))
            plgpu.barrier_arrive(self.barriers.turn.at[following])


def _wide(row_M: Any, like: Any) -> Any:
    return lax.broadcast_in_dim(row_M, like.shape, [0])
