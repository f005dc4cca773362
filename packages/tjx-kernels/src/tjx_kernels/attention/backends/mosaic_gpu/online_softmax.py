"""Compute warpgroups of the Hopper forward pass: products and online softmax of their rows.

`forward` describes what overlaps. Axes: M rows of queries of a warpgroup, X
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
from tjx_kernels.attention.call import AttentionCall
from tjx_kernels.attention.masks import key_blocks

plgpu: Any = mosaic_gpu  # JAX gives most of it no types


class Inputs(NamedTuple):
    """Operands of the forward kernel in device memory, padded by `padded`."""

    q: Any  # [B, T, N, H]
    k: Any  # [B, S, K, H]
    v: Any
    offset: Any = None  # [B]
    q_ids: Any = None  # [B, T]
    kv_ids: Any = None  # [B, S]
    ranges: Any = None  # [B, blocks of rows, 2]: blocks of keys that share a segment with the rows


class Shared(NamedTuple):
    """Shared memory of W compute warpgroups, with ring buffers of R blocks of keys."""

    q: Any  # [B * W, M, H]: queries in B buffers, reused for the output of the tile
    k: Any  # [R, X, H]
    v: Any
    lse: Any  # [W, M]
    q_ids: Any  # [B * W, M]
    kv_ids: Any  # [R, X]


class Barriers(NamedTuple):
    """Barriers between the copy warpgroup and the compute warpgroups.

    A slot is filled; every compute warpgroup waits for it (`k`, `v`) and frees it after its last
    product (`k_free`, `v_free`, one arrival each); then it is filled again. So no slot is
    overwritten while it is read, and no barrier completes twice before every waiter has observed
    the first completion. `turn` rotates over the compute warpgroups from 0 on, and a warpgroup
    never waits during its turn. A copy depends only on products of earlier blocks, which depend
    only on earlier copies: there is no deadlock.
    """

    q: Any  # [B * W]: a warpgroup's queries have arrived
    k: Any  # [R]: a block of keys (and their segment ids) has arrived
    v: Any  # [R]
    q_free: Any  # [B * W]: the output has been read from the buffer
    k_free: Any  # [R]
    v_free: Any  # [R]
    turn: Any  # [W]: a warpgroup may issue its products


class Visit(NamedTuple):
    """Tile of a thread block and its range of key blocks."""

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
    """State of the online softmax of a warpgroup's rows.

    `out` is the sum of p v over all visited blocks but the last, whose `p` is not yet multiplied.
    `total` and `p` are relative to the maximum `top` of the base-2 scores; `out` is after a
    multiplication by `rescale`.
    """

    out: Any  # float32 [M, H]
    rescale: Any  # float32 [M]
    top: Any  # float32 [M]
    total: Any  # float32 [M]
    p: Any  # [M, X]


@dataclass(frozen=True)
class Consumer:
    """Forward pass of one compute warpgroup for the rows of a tile."""

    call: AttentionCall
    sizes: BlockSizes
    inputs: Inputs
    shared: Shared
    barriers: Barriers
    visit: Visit
    group: Any

    @property
    def place(self) -> Any:
        """Index of the queries in shared memory."""
        return self.visit.buffer + self.group

    def slot(self, t: Any) -> Any:
        """Return the slot of block t in the ring buffers."""
        return lax.rem(self.visit.before + t, jnp.int32(self.sizes.stages))

    def run(self, out_BTNH: Any, lse_BNT: Any, located: Any) -> None:
        """Visit all blocks of keys and write output and LSE.

        `located()` returns the batch row, head and index of the tile.
        """
        mine = self.shared.q.at[self.place]
        plgpu.barrier_wait(self.barriers.q.at[self.place])
        state = self.visit_all()

        out_MH = self.last(state)
        dead_M = state.total == 0
        inverse_M = 1 / jnp.where(dead_M, 1.0, state.total)
        # All products with the queries are complete: reuse their tile.
        mine[...] = (out_MH * _wide(inverse_M, out_MH)).astype(self.call.dtype)
        lse_M = (state.top + jnp.log2(jnp.where(dead_M, 1.0, state.total))) * math.log(2)
        self.shared.lse.at[self.group][...] = jnp.where(dead_M, -jnp.inf, lse_M)
        plgpu.commit_smem()  # make the writes visible to TMA
        batch, head, index = located()
        span = pl.ds((index * self.sizes.warps + self.group) * self.sizes.q, self.sizes.q)
        plgpu.copy_smem_to_gmem(mine, out_BTNH.at[batch, span, head])
        lse_span = lse_BNT.at[batch, head, span]
        plgpu.copy_smem_to_gmem(self.shared.lse.at[self.group], lse_span)
        # Free the buffer for the next queries once TMA has read the results.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(self.barriers.q_free.at[self.place])

    def visit_all(self) -> Softmax:
        """Visit all blocks; the p v of the last one is not yet added."""
        call, visit, (_, keys, _, _) = self.call, self.visit, self.sizes
        number = visit.number
        own = key_blocks(call, visit.position + self.group * self.sizes.q, self.sizes.q, keys)
        whole = (0, 0) if call.segment_ids else (own.full_start, own.full_stop)
        # Blocks [full_start, full_stop) need no mask: visits [left, right).
        left = jnp.clip(visit.stop - whole[1], 1, number)
        right = jnp.clip(visit.stop - whole[0], left, number)
        placed = call.causal or call.window is not None

        state = self.first(masks=placed or call.segment_ids or call.kv_len % keys != 0)
        if call.segment_ids:
            return self.loop(1, number, state, masks=True)
        ends = call.lookahead is not None  # otherwise only the last block can have masked keys
        if ends:
            state = self.loop(1, left, state, masks=True)
        state = self.loop(left if ends else 1, right, state, masks=False)
        if call.window is not None:
            state = self.loop(right, number, state, masks=True)
        return state

    def loop(self, start: Any, stop: Any, state: Softmax, *, masks: bool) -> Softmax:
        """Run `step` for blocks start, ..., stop - 1."""
        result: Softmax = lax.fori_loop(start, stop, partial(self.step, masks=masks), state)
        return result

    def first(self, *, masks: bool) -> Softmax:
        """Visit the first block: no earlier p v product exists."""
        rows, head_dim = self.sizes.q, self.call.head_dim
        slot = self.slot(0)
        plgpu.barrier_wait(self.barriers.k.at[slot])
        # Warpgroup 0 has the first turn and awaits its next one in `last`.
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
        """Visit block t: its scores and softmax overlap with the previous block's p v."""
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
        """Compute the softmax of block t while the tensor cores add the previous block's p v."""
        rows, keys = self.sizes.q, self.sizes.k

        def products(refs: Any) -> None:
            out_ref, *softmax_refs = refs

            def scores(scores_ref: Any) -> Softmax:
                self.await_turn()
                plgpu.wgmma(scores_ref, *self.score_operands(slot))
                plgpu.wgmma(out_ref, state.p, self.shared.v.at[before])
                self.pass_turn()
                # Wait for the scores only: the other product may still be in flight.
                raw_MX = plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)
                return self.softmax(raw_MX, t, slot, state, masks=masks)

            new = pl.run_scoped(scores, self.score_type())
            for ref, x in zip(softmax_refs, new[1:], strict=True):
                ref[...] = x

        # The values assigned to the references are the result, after the product has completed.
        # (p stays float32 until then: the product reads other registers.)
        new_p_MX = plgpu.layout_cast(jnp.zeros((rows, keys), jnp.float32), plgpu.Layout.WGMMA)
        start = (plgpu.ACC.init(state.out), *state[1:4], new_p_MX)
        return Softmax(*pl.run_state(products)(start))

    def overlapped_in_order(
        self, t: Any, slot: Any, before: Any, state: Softmax, *, masks: bool
    ) -> Softmax:
        """Compute the result of `overlapped` in sequence, for interpret mode.

        The interpreter supports neither `run_state` nor wgmma with register operands.
        """

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
        """Rescale the output to the maximum that p is relative to."""
        out_MH = state.out * _wide(state.rescale, state.out)
        return state._replace(out=out_MH)

    def last(self, state: Softmax) -> jax.Array:
        """Add the p v of the last block and return the sum over all blocks."""
        pl.when(self.group == 0)(self.await_turn)
        slot = self.slot(self.visit.number - 1)
        plgpu.barrier_wait(self.barriers.v.at[slot])
        out_MH = self.accumulate(self.rescaled(state), slot)
        plgpu.barrier_arrive(self.barriers.v_free.at[slot])
        return out_MH

    def accumulate(self, state: Softmax, slot: Any) -> jax.Array:
        """Add p v without overlap."""
        v_XH = self.shared.v.at[slot]
        if self.call.interpret:
            product: jax.Array = jnp.dot(state.p, v_XH[...], preferred_element_type=jnp.float32)
            plgpu.commit_smem()  # orders the plain read before the next copy; wgmma needs none
            total: jax.Array = state.out + product
            return total
        start = plgpu.ACC.init(state.out)
        result: jax.Array = pl.run_state(lambda ref: plgpu.wgmma(ref, state.p, v_XH))(start)
        return result

    def softmax(self, raw_MX: Any, t: Any, slot: Any, state: Softmax, *, masks: bool) -> Softmax:
        """Compute p and the new maximum of block t; `out` is unchanged, `rescale` is its factor."""
        x_MX, factor = base2(self.call, raw_MX)
        ids: dict[str, Any] = {}
        if self.call.segment_ids:
            q_ids, kv_ids = self.shared.q_ids.at[self.place], self.shared.kv_ids.at[slot]
            ids["q_ids"] = plgpu.load(q_ids, layout=ROWS)
            ids["kv_ids"] = plgpu.load(kv_ids, layout=COLUMNS)
            # Order plain reads before the next copy; those of wgmma are ordered by its completion.
            plgpu.commit_smem()
        plgpu.barrier_arrive(self.barriers.k_free.at[slot])
        if masks:
            first_key = (self.visit.stop - 1 - t) * self.sizes.k
            position = self.visit.position + self.group * self.sizes.q
            x_MX = masked(self.call, x_MX, position, first_key, q_axis=0, **ids)
        top_M = jnp.maximum(state.top, jnp.max(x_MX, axis=1) * factor)
        # Rows without a visible key so far: -inf - -inf would be NaN.
        shift_M = jnp.where(top_M == -jnp.inf, 0.0, top_M) if masks else top_M
        rescale_M = jnp.exp2(state.top - shift_M)
        p_MX = jnp.exp2(x_MX * factor - _wide(shift_M, x_MX))
        total_M = state.total * rescale_M + jnp.sum(p_MX, axis=1)
        return Softmax(state.out, rescale_M, top_M, total_M, p_MX)

    def rounded(self, state: Softmax) -> Softmax:
        """Cast p to the dtype of the product."""
        # The barrier keeps the compiler from moving the conversion between the two products of the
        # next block, which would serialize them.
        p = lax.optimization_barrier(state.p.astype(self.call.dtype))  # type: ignore[no-untyped-call]  # as jax is
        return state._replace(p=p)

    def score_type(self) -> Any:
        """Return the type of a score accumulator, initially 0."""
        return plgpu.ACC((self.sizes.q, self.sizes.k), jnp.float32)

    def score_operands(self, slot: Any) -> tuple[Any, Any]:
        """Return the operands q and k^T of the score product."""
        return self.shared.q.at[self.place], self.shared.k.at[slot].transpose((1, 0))

    def await_turn(self) -> None:
        """Wait until the previous warpgroup has issued its products."""
        if self.sizes.warps > 1:
            plgpu.barrier_wait(self.barriers.turn.at[self.group])

    def pass_turn(self) -> None:
        """Allow the next warpgroup to issue its products."""
        if self.sizes.warps > 1:
            following = lax.rem(self.group + 1, jnp.int32(self.sizes.warps))
            plgpu.barrier_arrive(self.barriers.turn.at[following])


def _wide(row_M: Any, like: Any) -> Any:
    return lax.broadcast_in_dim(row_M, like.shape, [0])
