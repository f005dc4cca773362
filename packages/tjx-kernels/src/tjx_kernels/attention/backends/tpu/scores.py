"""Grid, tiling and score tiles shared by the TPU kernels.

A tile is `block_q` rows by `block_k` keys, with rows on the sublanes and keys on the lanes. The
kernel for dk and dv computes it transposed, so that no product needs a transposed left operand.

Axes: B batch, N query heads, K key heads, T rows (queries), S keys, H head_dim, V v_head_dim, all
lengths padded to whole blocks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tjx_kernels.attention import dropout
from tjx_kernels.attention.call import AttentionCall, make_mask
from tjx_kernels.attention.masks import Blocks, Int, key_blocks, row_blocks

LANES = 128
# Below every visible score, and finite: a masked score minus this is still -inf.
LOWEST = float(np.finfo(np.float32).min)


class Arrays(NamedTuple):
    """Arrays of a kernel, or their blocks; None for absent ones.

    Values per row or key are stored along the lanes, [.., 1, T]: along the sublanes they would take
    128 times the memory.
    """

    q: Any = None  # [B, N, T, H]
    k: Any = None  # [B, K, S, H]
    v: Any = None  # [B, K, S, V]
    q_ids: Any = None  # [B, 1, T]
    kv_ids: Any = None  # [B, 1, S]
    bias: Any = None  # [B or 1, N or 1, T, S]
    out: Any = None  # [B, N, T, V]; the output's cotangent in the backward pass
    lse: Any = None  # [B, N, 1, T]
    delta: Any = None  # [B, N, 1, T]


class Scalars(NamedTuple):
    """Prefetched values in scalar memory, as flat arrays."""

    offset: Any = None  # [B]
    start: Any = None  # [B * blocks]: blocks that share a segment with a block,
    stop: Any = None  # from `start` up to `stop`
    slopes: Any = None  # [B * N]
    seed: Any = None  # [B * 2]
    order: Any = None  # [m * h * blocks * others], flat as `masks.BlockLists` of a mask function
    full: Any = None  # [m * h * blocks]
    listed: Any = None  # [m * h * blocks]


class GridPosition(NamedTuple):
    """Batch row, query head, block of rows and block of keys of a grid step."""

    batch: Any
    head: Any
    q_block: Any
    k_block: Any


class Tile(NamedTuple):
    """Batch row, query head, first row and first key of a score tile."""

    batch: Any
    head: Any
    row: Any
    key: Any


class Visits(NamedTuple):
    """Blocks to visit, a range or, under a mask function, a range of a list.

    Attributes
    ----------
    range
        The blocks, or their places in the list.
    order
        Blocks in the list's order, in scalar memory; None for a range.
    base
        Place of the list in `order`.
    """

    range: Blocks
    order: Any = None
    base: Any = 0

    def at(self, step: Any) -> Any:
        """Return the block visited at a step."""
        place = self.range.start + step
        return place if self.order is None else self.order[self.base + place]

    def fetched(self, step: Any, count: int) -> Any:
        """Return the block to fetch at a step; after the last it repeats, which fetches nothing."""
        place = jnp.minimum(self.range.start + step, self.range.stop - 1)
        place = jnp.clip(place, 0, count - 1)
        return place if self.order is None else self.order[self.base + place]


@dataclass(frozen=True)
class Tiling:
    """Block sizes of a call and the derived block counts and ranges.

    `lists` are the sizes of the block lists of a mask function along batch and heads.
    """

    call: AttentionCall
    block_q: int
    block_k: int
    lists: tuple[int, int] = (1, 1)

    @property
    def q_blocks(self) -> int:
        """Number of blocks of rows."""
        return -(-self.call.q_len // self.block_q)

    @property
    def k_blocks(self) -> int:
        """Number of blocks of keys."""
        return -(-self.call.kv_len // self.block_k)

    @property
    def factors(self) -> tuple[float, float]:
        """Factors of q and of the scores: q takes the scale if that causes no rounding."""
        scale = self.call.scale
        exact = self.call.dtype == "float32" or abs(math.frexp(scale)[0]) == 0.5
        return (scale, 1.0) if exact else (1.0, scale)

    def offset(self, scalars: Scalars, batch: Any) -> Int:
        """Return the position of the first query."""
        given = self.call.q_offset
        return scalars.offset[batch] if given is None else given

    def keys_of(self, scalars: Scalars, batch: Any, head: Any, block: Any) -> Visits:
        """Return the blocks of keys visible to a block of rows."""
        if self.call.mask is not None:
            return self._listed(scalars, batch, head, block, self.q_blocks, self.k_blocks)
        return Visits(self.key_range(scalars, batch, block))

    def key_range(self, scalars: Scalars, batch: Any, block: Any) -> Blocks:
        """Return the range of keys visible to a block of rows, without the mask function."""
        position = self.offset(scalars, batch) + block * self.block_q
        found = key_blocks(self.call, position, self.block_q, self.block_k)
        if self.call.mask is not None:
            return found._replace(full_start=found.start, full_stop=found.start)
        return _of_segments(found, scalars, batch * self.q_blocks + block)

    def rows_of(self, scalars: Scalars, batch: Any, head: Any, block: Any) -> Visits:
        """Return the blocks of rows to which a block of keys is visible."""
        if self.call.mask is not None:
            return self._listed(scalars, batch, head, block, self.k_blocks, self.q_blocks)
        offset = self.offset(scalars, batch)
        first = block * self.block_k
        found = row_blocks(self.call, offset, first, self.block_k, self.block_q)
        return Visits(_of_segments(found, scalars, batch * self.k_blocks + block))

    def _listed(
        self, scalars: Scalars, batch: Any, head: Any, block: Any, blocks: int, others: int
    ) -> Visits:
        row, column = (
            lax.rem(x, jnp.int32(n)) for x, n in zip((batch, head), self.lists, strict=True)
        )
        own = (row * self.lists[1] + column) * blocks + block
        full, stop = scalars.full[own], scalars.listed[own]
        return Visits(Blocks(0, 0, full, stop), scalars.order, own * others)

    def key_steps(self) -> int:
        """Return an upper bound of the key blocks visible to a block of rows."""
        return self._steps(self.k_blocks, self.block_q, self.block_k)

    def row_steps(self) -> int:
        """Return an upper bound of the row blocks to which a block of keys is visible."""
        return self._steps(self.q_blocks, self.block_k, self.block_q)

    @property
    def masks_rows(self) -> bool:
        """Whether the causal mask, window, segment ids or mask function can mask a pair."""
        call = self.call
        limits = call.window, call.mask
        return call.causal or call.segment_ids or any(x is not None for x in limits)

    @property
    def masks_keys(self) -> bool:
        """Whether `masks_rows`, or a block of keys reaches past the end."""
        return self.masks_rows or self.call.kv_len % self.block_k > 0

    def _steps(self, blocks: int, width: int, block: int) -> int:
        window, lookahead = self.call.window, self.call.lookahead
        if window is None or lookahead is None:
            return blocks
        seen = width + window - 1 + lookahead  # consecutive, starting anywhere in a block
        return min(blocks, (seen - 2) // block + 2)


def _of_segments(found: Blocks, scalars: Scalars, index: Any) -> Blocks:
    if scalars.start is None:
        return found
    start = jnp.maximum(found.start, scalars.start[index])
    stop = jnp.minimum(found.stop, scalars.stop[index])
    return Blocks(start, start, start, stop)  # segment ids mask every block


def visit(
    tiling: Tiling, blocks: Blocks, step: Any, masks: bool, process: Callable[[bool], None]
) -> None:
    """Run `process(masked)` for a visible block, with `masked` False if it is fully visible.

    `masks` states whether any block needs a mask.
    """
    block = blocks.start + step
    seen = block < blocks.stop
    if not masks or tiling.call.segment_ids:
        pl.when(seen)(lambda: process(masks))
        return
    whole = (block >= blocks.full_start) & (block < blocks.full_stop)
    pl.when(seen & whole)(lambda: process(False))
    pl.when(seen & ~whole)(lambda: process(True))


def launch(
    name: str,
    kernel: Callable[..., None],
    tiling: Tiling,
    grid: tuple[int, ...],
    parallel: int,
    where: Callable[..., GridPosition],
    operands: tuple[Scalars, Arrays],
    results: Arrays,
    scratch: list[Any],
) -> Arrays:
    """Launch a kernel over a grid whose first `parallel` axes may run in any order.

    `where(scalars, *index)` returns the `GridPosition` of a step. The kernel takes the tiling,
    scalars, blocks, results and scratch.
    """
    scalars, arrays = operands
    flat, structure = jax.tree.flatten(scalars)

    def locate(*index: Any) -> GridPosition:
        given = jax.tree.unflatten(structure, index[len(grid) :])
        return where(given, *index[: len(grid)])

    def body(*refs: Any) -> None:
        given = jax.tree.unflatten(structure, refs[: len(flat)])
        kernel(tiling, given, *refs[len(flat) :])

    specs = _specs(tiling, arrays.bias if results.bias is None else results.bias, locate)
    (found,) = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(flat),
            grid=grid,
            in_specs=[_where_present(specs, arrays)],
            out_specs=[_where_present(specs, results)],
            scratch_shapes=scratch,
        ),
        out_shape=[results],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=[
                pltpu.PARALLEL if axis < parallel else pltpu.ARBITRARY for axis in range(len(grid))
            ]
        ),
        interpret=tiling.call.interpret,
        name=f"flash_attention_{name}",
    )(*flat, arrays)
    return Arrays(*found)


def result(like: jax.Array, shape: tuple[int, ...], dtype: Any = None) -> jax.ShapeDtypeStruct:
    """Return the type of a kernel's result, with the varying mesh axes of `like`."""
    # jax has no types here
    return jax.ShapeDtypeStruct(  # type: ignore[no-untyped-call]
        shape, dtype or like.dtype, manual_axis_type=jax.typeof(like).manual_axis_type
    )


def _where_present(specs: Arrays, arrays: Arrays) -> Arrays:
    return Arrays(*(None if x is None else s for s, x in zip(specs, arrays, strict=True)))


def _specs(tiling: Tiling, bias: Any, locate: Callable[..., GridPosition]) -> Arrays:
    """Return the block spec of each array."""
    call, q, k = tiling.call, tiling.block_q, tiling.block_k

    def spec(shape: tuple[int | None, ...], index: Callable[[GridPosition], Any]) -> Any:
        return pl.BlockSpec(shape, lambda *step: index(locate(*step)))

    def of_q(at: GridPosition) -> Any:
        return (at.batch, at.head, at.q_block, 0)

    def of_k(at: GridPosition) -> Any:
        return (at.batch, lax.div(at.head, jnp.int32(call.group)), at.k_block, 0)

    def of_row(at: GridPosition) -> Any:
        return (at.batch, at.head, 0, at.q_block)

    def of_bias(at: GridPosition) -> Any:
        batch = at.batch if bias.shape[0] > 1 else 0
        return (batch, at.head if bias.shape[1] > 1 else 0, at.q_block, at.k_block)

    return Arrays(
        q=spec((None, None, q, call.head_dim), of_q),
        k=spec((None, None, k, call.head_dim), of_k),
        v=spec((None, None, k, call.v_head_dim), of_k),
        q_ids=spec((None, 1, q), lambda at: (at.batch, 0, at.q_block)),
        kv_ids=spec((None, 1, k), lambda at: (at.batch, 0, at.k_block)),
        bias=spec((None, None, q, k), of_bias),
        out=spec((None, None, q, call.v_head_dim), of_q),
        lse=spec((None, None, 1, q), of_row),
        delta=spec((None, None, 1, q), of_row),
    )


def product(a: jax.Array, b: jax.Array, transpose_b: bool = False) -> jax.Array:
    """Compute a b or a b^T with float32 accumulation, without rounding float32 to bfloat16."""
    return lax.dot_general(
        a,
        b,
        (((1,), (1 if transpose_b else 0,)), ((), ())),
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def lanes(x: jax.Array, width: int) -> jax.Array:
    """Resize a value that is constant along the lanes to `width` lanes."""
    return jnp.tile(x, (1, -(-width // LANES)))[:, :width]


def column(x: jax.Array) -> jax.Array:
    """Transpose values along the lanes, [1, n], to [n, LANES], constant along the lanes."""
    return jnp.broadcast_to(x, (LANES, x.shape[1])).T


def tile_scores(
    tiling: Tiling,
    tile: Tile,
    scalars: Scalars,
    x: Arrays,
    *,
    masked: bool,
    transposed: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Return scores [block_q, block_k] of a tile and the soft cap's derivative, None without a cap.

    `x` provides q, k, bias and the segment ids in broadcastable shapes: [rows, 1] and [1, keys], or
    transposed.
    """
    call = tiling.call
    scores = product(x.k, x.q, True) if transposed else product(x.q, x.k, True)
    factor, slope = tiling.factors[1], None
    if factor != 1.0:
        scores = scores * factor
    if call.soft_cap is not None:
        capped = jnp.tanh(scores * (1 / call.soft_cap))
        scores, slope = call.soft_cap * capped, 1 - capped * capped
    row, key = _indices(tiling, tile, transposed)
    position = row + tiling.offset(scalars, tile.batch)
    if scalars.slopes is not None:
        distance = jnp.abs(position - key).astype(jnp.float32)
        scores = scores - scalars.slopes[tile.batch * call.heads + tile.head] * distance
    if x.bias is not None:
        bias = x.bias.astype(jnp.float32)
        scores = scores + (bias.T if transposed else bias)
    if not masked:
        return scores, slope
    seen = make_mask(call, position, key, x.q_ids, x.kv_ids, batch=tile.batch, head=tile.head)
    if call.kv_len % tiling.block_k and not transposed:
        # In a transposed tile a key past the end is a separate row, which is dropped.
        within = key < call.kv_len
        seen = within if seen is None else seen & within
    assert seen is not None
    return jnp.where(seen, scores, -jnp.inf), slope


def dropped(
    tiling: Tiling, tile: Tile, scalars: Scalars, x: jax.Array, *, transposed: bool = False
) -> jax.Array:
    """Apply dropout to the weights of a tile, or to their gradients."""
    rate = tiling.call.dropout_rate
    if scalars.seed is None:
        return x
    words = [scalars.seed[2 * tile.batch + i] for i in (0, 1)]
    index = _indices(tiling, tile, transposed)
    kept = dropout.keep((words[0], words[1]), tile.head, *index, rate)
    return jnp.where(kept, x * (1 / (1 - rate)), 0.0)


def _indices(tiling: Tiling, tile: Tile, transposed: bool) -> tuple[jax.Array, jax.Array]:
    """Return the row and key indices of a tile, in shapes that broadcast against it."""
    axis = 1 if transposed else 0
    rows = (1, tiling.block_q) if transposed else (tiling.block_q, 1)
    keys = (tiling.block_k, 1) if transposed else (1, tiling.block_k)
    row = tile.row + lax.broadcasted_iota(jnp.int32, rows, axis)
    key = tile.key + lax.broadcasted_iota(jnp.int32, keys, 1 - axis)
    return row, key
