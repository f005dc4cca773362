"""Attention backend for NVIDIA GPUs of sm_80 and later in Pallas Triton.

The structure is that of FlashAttention-2 (Dao, "FlashAttention-2: Faster Attention with Better
Parallelism and Work Partitioning", 2023, section 3): the forward pass and dq loop over blocks of
keys for a block of rows, dk and dv over blocks of rows for a block of keys, without atomics. JAX
will remove Pallas Triton; then remove this file, its rows in `block_sizes` and its registry entry.

Axes: B batch, T query rows, N query heads, S keys, K key heads, H head_dim of q and k, V that of v,
b and n the bias's sizes along B and N, m and h those of a mask function, i blocks of rows, j blocks
of keys.
"""

import math
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from tjx_kernels.attention import dropout
from tjx_kernels.attention.backend import (
    AttentionBackend,
    BackwardInputs,
    Gradients,
    with_custom_vjp,
)
from tjx_kernels.attention.block_sizes import BlockSizes, Pass, Row, block_sizes
from tjx_kernels.attention.call import AttentionCall, Operands, make_mask
from tjx_kernels.attention.masks import (
    Blocks,
    block_lists,
    key_blocks,
    list_sizes,
    row_blocks,
    segment_blocks,
)

LOG2_E = math.log2(math.e)  # GPUs compute 2^x, not e^x: kernels hold scores in units of log 2
ALL = slice(None)
_iota = partial(lax.iota, jnp.int32)
_AXES = {
    **{"q": "BTNH", "k": "BSKH", "v": "BSKV", "q_segment_ids": "BT", "kv_segment_ids": "BS"},
    **{"q_offset": "B", "bias": "bnTS", "alibi_slopes": "BN", "dout": "BTNV", "lse": "BNT"},
    **{"delta": "BNT", "first_seed": "B", "second_seed": "B"},
    **{"keys_start": "Bi", "keys_stop": "Bi", "rows_start": "Bj", "rows_stop": "Bj"},
    **{"keys_order": "mhij", "keys_full": "mhi", "keys_listed": "mhi"},
    **{"rows_order": "mhji", "rows_full": "mhj", "rows_listed": "mhj"},
}


class _Array(NamedTuple):
    """Reference to a whole array, with each axis rounded up to whole blocks.

    Memory is not padded: loads and stores mask indices past the ends of `shape`, the real shape.
    """

    ref: Any
    shape: tuple[int, ...]

    def load(self, *index: Any, inside: bool = False, other: float = 0) -> Any:
        """Load scalars, slices (in bounds if `inside`) or ALL of an axis; `other` out of bounds."""
        view, mask = self._view(index, inside)
        return plt.load(view, mask=mask, other=None if mask is None else other)

    def store(self, value: jax.Array, *index: Any) -> None:
        view, mask = self._view(index, inside=False)
        plt.store(view, value.astype(self.ref.dtype), mask=mask)

    def _view(self, index: tuple[Any, ...], inside: bool) -> tuple[Any, jax.Array | None]:
        sized = zip(index, self.ref.shape, strict=True)
        spans: list[Any] = [pl.ds(0, size) if x is ALL else x for x, size in sized]
        axes = [axis for axis, x in enumerate(spans) if isinstance(x, pl.Slice)]
        shape = tuple(spans[axis].size for axis in axes)
        mask = None
        for i, axis in enumerate(axes):
            # Slices start at multiples of their size: only the last one may be out of bounds.
            if self.shape[axis] % shape[i] and (index[axis] is ALL or not inside):
                exists = spans[axis].start + _iota(shape[i]) < self.shape[axis]
                exists = lax.broadcast_in_dim(exists, shape, (i,))
                mask = exists if mask is None else mask & exists
        return self.ref.at[tuple(spans)], mask


def _dot(a: Any, b: Any, trans_b: bool = False) -> Any:
    """Multiply with float32 accumulation; HIGHEST prevents TF32 for float32 operands."""
    return plt.dot(a, b, trans_b=trans_b, precision=lax.Precision.HIGHEST)


class _Program(NamedTuple):
    """Work of one Triton program: query head `n` of batch row `b`."""

    call: AttentionCall
    sizes: BlockSizes
    arrays: Any  # has an _Array, or None, for each name in _AXES
    b: Any = None
    n: Any = None
    offset: Any = None
    slope: Any = None
    seed: Any = None

    def at(self, b: Any, n: Any) -> "_Program":
        call, x = self.call, self.arrays
        offset = call.q_offset if x.q_offset is None else x.q_offset.load(b)
        slope = x.alibi_slopes.load(b, n) * LOG2_E if call.alibi else None
        seed = (x.first_seed.load(b), x.second_seed.load(b)) if call.dropout_rate else None
        return self._replace(b=b, n=n, offset=offset, slope=slope, seed=seed)

    def within(self, sizes: tuple[int, ...]) -> Any:
        """Return the indices of batch row and head in an array that may share them (size 1)."""
        return [lax.rem(x, jnp.int32(n)) for x, n in zip((self.b, self.n), sizes, strict=True)]


class _Tile(NamedTuple):
    """A tile of scores [rows, keys], or [keys, rows] if `transposed`."""

    rows: Any  # pl.Slice, as are the keys
    keys: Any
    masked: bool
    transposed: bool = False

    def of_rows(self, x: Any) -> Any:
        return x[None, :] if self.transposed else x[:, None]

    def of_keys(self, x: Any) -> Any:
        return x[:, None] if self.transposed else x[None, :]

    def indices(self) -> tuple[Any, Any]:
        rows, keys = (x.start + _iota(x.size) for x in (self.rows, self.keys))
        return self.of_rows(rows), self.of_keys(keys)


def _scores(p: _Program, tile: _Tile, product: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Return scores in units of log 2, -inf where masked, and the derivative of the soft cap."""
    call, arrays, cap, slope = p.call, p.arrays, p.call.soft_cap, None
    if cap is None:
        scores = product * (call.scale * LOG2_E)
    else:
        squashed = jnp.tanh(product * (call.scale / cap))
        scores, slope = squashed * (cap * LOG2_E), 1 - squashed * squashed
    row, key = tile.indices()
    position = p.offset + row
    if call.alibi:
        scores -= p.slope * jnp.abs(position - key).astype(jnp.float32)
    if call.bias is not None:
        shared = p.within(call.bias)
        bias = arrays.bias.load(*shared, tile.rows, tile.keys).astype(jnp.float32) * LOG2_E
        scores += bias.T if tile.transposed else bias
    if tile.masked:
        q_ids, kv_ids = arrays.q_segment_ids, arrays.kv_segment_ids
        if call.segment_ids:
            q_ids = tile.of_rows(q_ids.load(p.b, tile.rows))
            kv_ids = tile.of_keys(kv_ids.load(p.b, tile.keys))
        mask = make_mask(call, position, key, q_ids, kv_ids, batch=p.b, head=p.n)
        if call.kv_len % p.sizes.k:
            mask = (key < call.kv_len) & (True if mask is None else mask)
        if mask is not None:
            scores = jnp.where(mask, scores, -jnp.inf)
    return scores, slope


def _drop(p: _Program, tile: _Tile, weights: Any) -> Any:
    rate = p.call.dropout_rate
    kept = dropout.keep(p.seed, p.n, *tile.indices(), rate) if rate else True
    return jnp.where(kept, weights * (1 / (1 - rate)), 0) if rate else weights


def _load_rows(p: _Program, rows: Any, inside: bool = False) -> Any:
    """Load q and dout [rows, .], the LSE in units of log 2 and delta [rows]."""
    q, dout = (x.load(p.b, rows, p.n, ALL, inside=inside) for x in (p.arrays.q, p.arrays.dout))
    # Rows out of bounds get the LSE inf, which makes their weights 0.
    lse = p.arrays.lse.load(p.b, p.n, rows, inside=inside, other=math.inf) * LOG2_E
    return q, dout, lse, p.arrays.delta.load(p.b, p.n, rows, inside=inside)


def _load_keys(p: _Program, keys: Any, inside: bool = False) -> Any:
    kv_head = lax.div(p.n, jnp.int32(p.call.group))
    return [x.load(p.b, keys, kv_head, ALL, inside=inside) for x in (p.arrays.k, p.arrays.v)]


def _derivatives(p: _Program, tile: _Tile, of_rows: Any, of_keys: Any) -> Any:
    """Return the weights, the gradients of the unscaled scores before the cap, and of the bias."""
    (q, dout, lse, delta), (k, v) = of_rows, of_keys
    pairs = ((k, q), (v, dout)) if tile.transposed else ((q, k), (dout, v))
    product, dweights = (_dot(*pair, trans_b=True) for pair in pairs)
    scores, slope = _scores(p, tile, product)
    weights = jnp.exp2(scores - tile.of_rows(lse))
    dweights = _drop(p, tile, dweights)
    dbias = weights * (dweights - tile.of_rows(delta))
    return _drop(p, tile, weights), dbias if slope is None else dbias * slope, dbias


def _loop(start: Any, stop: Any, step: Any, carry: Any) -> Any:
    return lax.fori_loop(jnp.int32(start), jnp.int32(stop), step, carry)


def _sweep(
    p: _Program, own: Any, others: str, blocks: Blocks, ends: Any, step: Any, sums: Any
) -> Any:
    """Run `step(masked, block, sums)` over `blocks`, unmasked for fully visible ones.

    `ends` states whether there are partly visible blocks before and after them. With segment ids
    the blocks that share a segment with block `own` are visited, all masked; under a mask function,
    the listed blocks. `others`, "keys" or "rows", is the axis of the visited blocks.
    """

    def array(name: str) -> _Array:
        found: _Array = getattr(p.arrays, f"{others}_{name}")
        return found

    if p.call.mask is not None:
        order = array("order")
        at = *p.within(order.shape[:2]), own
        full, stop = array("full").load(*at), array("listed").load(*at)

        def visit(masked: bool, index: Any, sums: Any) -> Any:
            return step(masked, order.load(*at, index), sums)

        return _loop(full, stop, partial(visit, True), _loop(0, full, partial(visit, False), sums))
    if p.call.segment_ids:
        start, stop = array("start").load(p.b, own), array("stop").load(p.b, own)
        start, stop = jnp.maximum(blocks.start, start), jnp.minimum(blocks.stop, stop)
        return _loop(start, stop, partial(step, True), sums)
    if ends[0]:
        sums = _loop(blocks.start, blocks.full_start, partial(step, True), sums)
    sums = _loop(blocks.full_start, blocks.full_stop, partial(step, False), sums)
    return _loop(blocks.full_stop, blocks.stop, partial(step, True), sums) if ends[1] else sums


def _sweep_keys(p: _Program, i: Any, rows: Any, step: Any, carry: Any) -> Any:
    """Run `step(tile, k, v, carry)` over the blocks of keys visible to block i of rows."""
    call, size = p.call, p.sizes.k

    def with_keys(masked: bool, j: Any, carry: Any) -> Any:
        tile = _Tile(rows, pl.ds(j * size, size), masked)
        return step(tile, *_load_keys(p, tile.keys, inside=not masked), carry)

    blocks = key_blocks(call, p.offset + rows.start, p.sizes.q, size)
    ends = (call.window is not None, call.lookahead is not None or call.kv_len % size > 0)
    return _sweep(p, i, "keys", blocks, ends, with_keys, carry)


def _rows_of_program(p: _Program) -> tuple[_Program, Any, Any]:
    i = pl.program_id(0)
    if p.call.causal:  # the last rows have most keys: start them first for load balance
        i = pl.num_programs(0) - 1 - i
    return p.at(pl.program_id(2), pl.program_id(1)), i, pl.ds(i * p.sizes.q, p.sizes.q)


def _forward_kernel(p: _Program, out: _Array, lse: _Array) -> None:
    p, i, rows = _rows_of_program(p)
    q = p.arrays.q.load(p.b, rows, p.n, ALL)

    def step(tile: _Tile, k: Any, v: Any, carry: Any) -> Any:
        acc, top, total = carry
        scores, _ = _scores(p, tile, _dot(q, k, trans_b=True))
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        # A row without a visible key so far has the maximum -inf, and -inf - -inf would be NaN.
        shift = jnp.where(new_top == -jnp.inf, 0, new_top)
        shrink = jnp.exp2(top - shift)
        weights = jnp.exp2(scores - shift[:, None])
        total = total * shrink + jnp.sum(weights, axis=1)
        acc = acc * shrink[:, None] + _dot(_drop(p, tile, weights).astype(v.dtype), v)
        return acc, new_top, total

    acc = jnp.zeros((p.sizes.q, p.arrays.v.ref.shape[3]), jnp.float32)
    top, total = (jnp.full(p.sizes.q, x, jnp.float32) for x in (-jnp.inf, 0))
    acc, top, total = _sweep_keys(p, i, rows, step, (acc, top, total))
    total = jnp.where(dead := total == 0, 1, total)
    out.store(acc * (1 / total)[:, None], p.b, rows, p.n, ALL)
    lse.store(jnp.where(dead, -jnp.inf, (top + jnp.log2(total)) / LOG2_E), p.b, p.n, rows)


def _dq_kernel(p: _Program, dq: _Array) -> None:
    p, i, span = _rows_of_program(p)
    rows = _load_rows(p, span)

    def step(tile: _Tile, k: Any, v: Any, acc: Any) -> Any:
        dscores = _derivatives(p, tile, rows, (k, v))[1]
        return acc + _dot(dscores.astype(k.dtype), k)

    acc = _sweep_keys(p, i, span, step, jnp.zeros(rows[0].shape, jnp.float32))
    dq.store(acc * p.call.scale, p.b, span, p.n, ALL)


def _dkv_kernel(p: _Program, dk: _Array, dv: _Array) -> None:
    """Compute dk and dv: loop over the query heads of the key head and their blocks of rows."""
    (j, kv_head, b), call, size = map(pl.program_id, range(3)), p.call, p.sizes.q
    keys = pl.ds(j * p.sizes.k, p.sizes.k)
    k, v = (x.load(b, keys, kv_head, ALL) for x in (p.arrays.k, p.arrays.v))

    def of_head(g: Any, carry: Any) -> Any:
        head = p.at(b, kv_head * call.group + g)

        def step(masked: bool, i: Any, carry: Any) -> Any:
            tile = _Tile(pl.ds(i * size, size), keys, masked, transposed=True)
            rows = q, dout, *_ = _load_rows(head, tile.rows, inside=not masked)
            weights, dscores, _ = _derivatives(head, tile, rows, (k, v))
            k_sum = carry[0] + _dot(dscores.astype(k.dtype), q)
            return k_sum, carry[1] + _dot(weights.astype(v.dtype), dout)

        blocks = row_blocks(call, head.offset, keys.start, p.sizes.k, size)
        ends = (call.lookahead is not None, call.window is not None or call.q_len % size > 0)
        return _sweep(head, j, "rows", blocks, ends, step, carry)

    sums = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    k_sum, v_sum = _loop(0, call.group, of_head, sums)
    dk.store(k_sum * call.scale, b, keys, kv_head, ALL)
    dv.store(v_sum, b, keys, kv_head, ALL)


def _dbias_kernel(p: _Program, dbias: _Array) -> None:
    """Compute a tile of dbias: sum over the batch rows and heads that share it."""
    j, i, n, b = map(pl.program_id, range(4))
    rows, keys = (pl.ds(x * size, size) for x, size in ((i, p.sizes.q), (j, p.sizes.k)))
    tile = _Tile(rows, keys, masked=True)
    bias_batch, bias_heads = p.call.bias or (1, 1)

    def of_row(row: Any, total: Any) -> Any:
        blocks = key_blocks(p.call, p.at(b + row, n).offset + rows.start, p.sizes.q, p.sizes.k)
        seen = (j >= blocks.start) & (j < blocks.stop)

        def of_head(m: Any, total: Any) -> Any:
            head = p.at(b + row, n + m)
            inputs = _load_rows(head, rows), _load_keys(head, keys)
            return total + _derivatives(head, tile, *inputs)[2]

        stop = jnp.where(seen, jnp.int32(p.call.heads // bias_heads), jnp.int32(0))
        return _loop(0, stop, of_head, total)

    total = jnp.zeros((p.sizes.q, p.sizes.k), jnp.float32)
    total = _loop(0, p.call.batch // bias_batch, of_row, total)
    dbias.store(total, b, n, rows, keys)


def _forward(call: AttentionCall, operands: Operands) -> tuple[jax.Array, jax.Array]:
    results = {"BTNV": call.dtype, "BNT": jnp.float32}
    out, lse = _launch(call, "forward", _forward_kernel, "iNB", operands._asdict(), results)
    return out, lse


def _backward(call: AttentionCall, operands: Operands, rows: BackwardInputs) -> Gradients:
    given, dbias = operands._asdict() | rows._asdict(), None
    (dq,) = _launch(call, "dq", _dq_kernel, "iNB", given, {"BTNH": call.dtype})
    results: dict[str, Any] = {"BSKH": call.dtype, "BSKV": call.dtype}
    dk, dv = _launch(call, "dkv", _dkv_kernel, "jKB", given, results)
    if operands.bias is not None:
        results = {"bnTS": operands.bias.dtype}
        (dbias,) = _launch(call, "dbias", _dbias_kernel, "jinb", given, results)
    return Gradients(dq, dk, dv, dbias)


def _launch(call: AttentionCall, which: Pass, kernel: Any, grid: str, given: Any, out: Any) -> Any:
    """Launch a kernel with one program per index of the axes in `grid`; `out`: axes and dtypes."""
    sizes = _sizes(call, which)
    given = {name: x for name, x in given.items() if x is not None}
    if call.dropout_rate:
        seed = given.pop("dropout_seed")
        given |= {"first_seed": seed[:, 0], "second_seed": seed[:, 1]}
    lists: tuple[int, int] = (1, 1)
    if call.mask is not None:
        lists, others = list_sizes(call), "rows" if which == "dkv" else "keys"
        operands = Operands(**{name: given.get(name) for name in Operands._fields})
        found = block_lists(call, operands, sizes.q, sizes.k, of_keys=which == "dkv")
        names = (f"{others}_{name}" for name in ("order", "full", "listed"))
        given |= dict(zip(names, found, strict=True))
    elif call.segment_ids:
        ids, blocks = (given["q_segment_ids"], given["kv_segment_ids"]), (sizes.q, sizes.k)
        given["keys_start"], given["keys_stop"] = segment_blocks(*ids, *blocks)
        given["rows_start"], given["rows_stop"] = segment_blocks(*ids[::-1], *blocks[::-1])
    length = {"B": call.batch, "T": call.q_len, "S": call.kv_len, "N": call.heads}
    length |= {"K": call.kv_heads, "H": call.head_dim, "V": call.v_head_dim}
    length |= {"i": pl.cdiv(call.q_len, sizes.q), "j": pl.cdiv(call.kv_len, sizes.k)}
    length |= dict(zip("bnmh", (call.bias or (1, 1)) + lists, strict=True))
    covered = length | {"T": length["i"] * sizes.q, "S": length["j"] * sizes.k}
    # Triton's dot needs powers of 2, at least 16.
    covered |= {axis: max(16, pl.next_power_of_2(length[axis])) for axis in "HV"}
    axes, count = [*(_AXES[name] for name in given), *out], len(given)
    shapes = [tuple(length[axis] for axis in names) for names in axes]
    specs = [pl.BlockSpec(tuple(covered[axis] for axis in names)) for names in axes]
    # Under shard_map the results vary over each mesh axis that an operand varies over.
    kinds = [jax.typeof(x).manual_axis_type for x in given.values()]
    kind = kinds[0].update(varying=frozenset().union(*(x.varying for x in kinds)))
    result = partial(jax.ShapeDtypeStruct, manual_axis_type=kind)

    def body(*refs: Any) -> None:
        arrays = [_Array(ref, shape) for ref, shape in zip(refs, shapes, strict=True)]
        named = dict.fromkeys(_AXES) | dict(zip(given, arrays[:count], strict=True))
        kernel(_Program(call, sizes, SimpleNamespace(**named)), *arrays[count:])

    body.__name__ = f"triton_attention{kernel.__name__.removesuffix('_kernel')}"
    return pl.pallas_call(
        body,
        grid=tuple(length[axis] for axis in grid),
        in_specs=specs[:count],
        out_specs=specs[count:],
        out_shape=[*map(result, shapes[count:], out.values())],
        compiler_params=plt.CompilerParams(num_warps=sizes.warps, num_stages=sizes.stages),
        interpret=call.interpret,
        name=body.__name__,
    )(*given.values())


def _sizes(call: AttentionCall, which: Pass) -> BlockSizes:
    # float32 uses no tensor cores, and its blocks take twice the memory.
    kernel = "triton-float32" if call.dtype == "float32" else "triton"
    # Desktop GPUs (sm_86, sm_89, sm_12x) have less shared memory than sm_80.
    architecture = "sm_90" if 90 <= _capability(call) < 120 else "sm_80"
    architecture = "interpret" if call.interpret else architecture
    row = Row(kernel, architecture, max(call.head_dim, call.v_head_dim), call.causal, which)
    q, k, stages, warps = block_sizes(row)
    q, k = (min(x, max(16, pl.next_power_of_2(n))) for x, n in ((q, call.q_len), (k, call.kv_len)))
    # Pipelined masked loads would exceed the registers.
    return BlockSizes(q, k, 1 if which == "dkv" and call.q_len % q else stages, warps)


def _capability(call: AttentionCall) -> int:
    digits = call.architecture.removeprefix("sm_")
    return int(digits) if call.platform == "gpu" and digits.isdigit() else 0


def _supports(call: AttentionCall) -> str | None:
    if call.dtype == "float64":
        return "computes in float32, never in float64"
    if max(call.head_dim, call.v_head_dim) > 256:
        return "needs a head_dim of at most 256"
    if not call.interpret and _capability(call) < 80:
        return "needs an NVIDIA GPU of sm_80 or later"
    return None


BACKEND = AttentionBackend(
    run=with_custom_vjp(_forward, _backward),
    supports=_supports,
    backward=_backward,
    platforms=("gpu",),
    masks=True,
)
