"""What the TPU kernels share: how a grid visits tiles of scores, and how one tile is computed.

A tile is `block_q` rows by `block_k` keys. Its scores are computed as they stand (rows on the
sublanes, keys on the lanes) or, for the gradients of keys and values, transposed: of two products
of a tile with an operand none then needs its left side transposed.

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
from tjx_kernels.attention.masks import Blocks, Int, key_blocks, row_blocks, visible
from tjx_kernels.attention.types import AttentionCall

LANES = 128
# Lower than any score of a key that is seen, and finite: less this, a masked score is still -inf.
LOWEST = float(np.finfo(np.float32).min)


class Arrays(NamedTuple):
    """The arrays of a kernel, or their blocks: what is absent is None.

    The values that belong to rows or keys lie along the lanes, [.., 1, T]: with one a sublane they
    would take 128 times the memory.
    """

    q: Any = None  # [B, N, T, H]
    k: Any = None  # [B, K, S, H]
    v: Any = None  # [B, K, S, V]
    q_ids: Any = None  # [B, 1, T]
    kv_ids: Any = None  # [B, 1, S]
    bias: Any = None  # [B or 1, N or 1, T, S]
    out: Any = None  # [B, N, T, V]; the backward pass has the output's cotangent here
    lse: Any = None  # [B, N, 1, T]
    delta: Any = None  # [B, N, 1, T]


class Scalars(NamedTuple):
    """What a kernel knows in scalar memory before its first block is fetched; flat arrays."""

    offset: Any = None  # [B]
    start: Any = None  # [B * blocks]: the blocks that share a segment with a block,
    stop: Any = None  # from `start` up to `stop`
    slopes: Any = None  # [B * N]
    seed: Any = None  # [B * 2]


class Place(NamedTuple):
    """What a step of a grid works on: batch row, query head, block of rows and block of keys."""

    batch: Any
    head: Any
    q_block: Any
    k_block: Any


class Tile(NamedTuple):
    """Where a tile of scores lies: batch row, query head, first row and first key."""

    batch: Any
    head: Any
    row: Any
    key: Any


@dataclass(frozen=True)
class Tiling:
    """One call cut into tiles."""

    call: AttentionCall
    block_q: int
    block_k: int

    @property
    def q_blocks(self) -> int:
        """How many blocks of rows there are."""
        return -(-self.call.q_len // self.block_q)

    @property
    def k_blocks(self) -> int:
        """How many blocks of keys there are."""
        return -(-self.call.kv_len // self.block_k)

    @property
    def factors(self) -> tuple[float, float]:
        """Split the scale in a factor of q, where that rounds nothing, and one of the scores."""
        scale = self.call.scale
        exact = self.call.dtype == "float32" or abs(math.frexp(scale)[0]) == 0.5
        return (scale, 1.0) if exact else (1.0, scale)

    def offset(self, scalars: Scalars, batch: Any) -> Int:
        """Position of the first query."""
        given = self.call.q_offset
        return scalars.offset[batch] if given is None else given

    def keys_of(self, scalars: Scalars, batch: Any, block: Any) -> Blocks:
        """Find the blocks of keys that a block of rows sees."""
        position = self.offset(scalars, batch) + block * self.block_q
        found = key_blocks(self.call, position, self.block_q, self.block_k)
        return _of_segments(found, scalars, batch * self.q_blocks + block)

    def rows_of(self, scalars: Scalars, batch: Any, block: Any) -> Blocks:
        """Find the blocks of rows that see a block of keys."""
        offset = self.offset(scalars, batch)
        first = block * self.block_k
        found = row_blocks(self.call, offset, first, self.block_k, self.block_q)
        return _of_segments(found, scalars, batch * self.k_blocks + block)

    def key_steps(self) -> int:
        """Bound the number of blocks of keys that a block of rows sees."""
        return self._steps(self.k_blocks, self.block_q, self.block_k)

    def row_steps(self) -> int:
        """Bound the number of blocks of rows that see a block of keys."""
        return self._steps(self.q_blocks, self.block_k, self.block_q)

    @property
    def masks_rows(self) -> bool:
        """Whether rows and keys may meet that do not see each other."""
        return self.call.causal or self.call.window is not None or self.call.segment_ids

    @property
    def masks_keys(self) -> bool:
        """The same, or whether there are keys past the end."""
        return self.masks_rows or self.call.kv_len % self.block_k > 0

    def _steps(self, blocks: int, width: int, block: int) -> int:
        if not self.call.causal or self.call.window is None:
            return blocks
        seen = width + self.call.window - 1  # so many in a row, from wherever in a block
        return min(blocks, (seen - 2) // block + 2)


def _of_segments(found: Blocks, scalars: Scalars, index: Any) -> Blocks:
    if scalars.start is None:
        return found
    start = jnp.maximum(found.start, scalars.start[index])
    stop = jnp.minimum(found.stop, scalars.stop[index])
    return Blocks(start, start, start, stop)  # ids decide within every block


def clamped(blocks: Blocks, step: Any, count: int) -> Any:
    """Choose the block to fetch at a step: past the last one that again, which fetches nothing."""
    return jnp.clip(jnp.minimum(blocks.start + step, blocks.stop - 1), 0, count - 1)


def visit(
    tiling: Tiling, blocks: Blocks, step: Any, masks: bool, process: Callable[[bool], None]
) -> None:
    """Run `process(masked)` for a step's block if it is seen, `masked` if not wholly.

    `masks` says whether there is anything to mask at all.
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
    where: Callable[..., Place],
    operands: tuple[Scalars, Arrays],
    results: Arrays,
    scratch: list[Any],
) -> Arrays:
    """Run a kernel over a grid whose first `parallel` axes may run in any order.

    `where(scalars, *index)` says what a step of the grid works on. The kernel gets the tiling,
    scalars, blocks, results and scratch.
    """
    scalars, arrays = operands
    flat, structure = jax.tree.flatten(scalars)

    def locate(*index: Any) -> Place:
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
    """Describe a result of a kernel; it varies over devices within `shard_map` as `like` does."""
    # jax has no types here
    return jax.ShapeDtypeStruct(  # type: ignore[no-untyped-call]
        shape, dtype or like.dtype, manual_axis_type=jax.typeof(like).manual_axis_type
    )


def _where_present(specs: Arrays, arrays: Arrays) -> Arrays:
    return Arrays(*(None if x is None else s for s, x in zip(specs, arrays, strict=True)))


def _specs(tiling: Tiling, bias: Any, locate: Callable[..., Place]) -> Arrays:
    """Say for each array which block of it belongs to a tile."""
    call, q, k = tiling.call, tiling.block_q, tiling.block_k

    def spec(shape: tuple[int | None, ...], index: Callable[[Place], Any]) -> Any:
        return pl.BlockSpec(shape, lambda *step: index(locate(*step)))

    def of_q(at: Place) -> Any:
        return (at.batch, at.head, at.q_block, 0)

    def of_k(at: Place) -> Any:
        return (at.batch, lax.div(at.head, jnp.int32(call.group)), at.k_block, 0)

    def of_row(at: Place) -> Any:
        return (at.batch, at.head, 0, at.q_block)

    def of_bias(at: Place) -> Any:
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
    """Multiply in float32: a b, or a b^T. float32 inputs are not rounded to bfloat16 first."""
    return lax.dot_general(
        a,
        b,
        (((1,), (1 if transpose_b else 0,)), ((), ())),
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def lanes(x: jax.Array, width: int) -> jax.Array:
    """Make `width` lanes of a value that fills all lanes of a row."""
    return jnp.tile(x, (1, -(-width // LANES)))[:, :width]


def column(x: jax.Array) -> jax.Array:
    """Turn values along the lanes, [1, n], into [n, LANES]: one a sublane, on all lanes."""
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
    """Scores of a tile [block_q, block_k], and the derivative of the soft cap where there is one.

    Of `x` come q, k and bias, and the ids in the shapes that broadcast: [rows, 1] and [1, keys],
    or transposed.
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
    seen = visible(call, position, key, x.q_ids, x.kv_ids)
    if call.kv_len % tiling.block_k and not transposed:
        # Transposed, a key past the end has a row of its own that nobody reads.
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
    """Give the indices of the rows and keys of a tile, in shapes that broadcast against it."""
    axis = 1 if transposed else 0
    rows = (1, tiling.block_q) if transposed else (tiling.block_q, 1)
    keys = (tiling.block_k, 1) if transposed else (1, tiling.block_k)
    row = tile.row + lax.broadcasted_iota(jnp.int32, rows, axis)
    key = tile.key + lax.broadcasted_iota(jnp.int32, keys, 1 - axis)
    return row, key
