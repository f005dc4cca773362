"""TPU backend: supported calls, and array layouts of the Pallas kernels.

The kernels shipped with JAX lack traced offsets, arbitrary lengths and a differentiable
log-sum-exp.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from tjx_kernels.attention.backend import (
    AttentionBackend,
    BackwardInputs,
    Gradients,
    with_custom_vjp,
)
from tjx_kernels.attention.backends.tpu import backward, forward
from tjx_kernels.attention.backends.tpu.scores import LANES, Arrays, Scalars, Tiling
from tjx_kernels.attention.batching import batched_backward, batched_forward
from tjx_kernels.attention.block_sizes import BlockSizes, Pass, Row, block_sizes
from tjx_kernels.attention.call import AttentionCall, Operands
from tjx_kernels.attention.masks import block_lists, list_sizes, segment_blocks

# Sublanes of a tile that holds for float32 and bfloat16 alike.
_SUBLANES = 16
_LARGEST_HEAD_DIM = 256


def _supports(call: AttentionCall) -> str | None:
    if call.platform != "tpu" and not call.interpret:
        return "needs a TPU"
    if call.dtype == "float64":
        return "computes in float32, never in float64"
    if max(call.head_dim, call.v_head_dim) > _LARGEST_HEAD_DIM:
        return f"needs a head_dim of at most {_LARGEST_HEAD_DIM}"
    return None


def _forward(call: AttentionCall, operands: Operands) -> tuple[jax.Array, jax.Array]:
    tiling = _tiling(call, "forward")
    arrays = _arrange(tiling, operands)
    out, lse = forward.forward(tiling, _scalars(tiling, operands), arrays)
    return _unpad(out, call.q_len, call.dtype), lse[:, :, 0, : call.q_len]


def _backward(call: AttentionCall, operands: Operands, rows: BackwardInputs) -> Gradients:
    tiling = _tiling(call, "dq")
    arrays, scalars = _arrange(tiling, operands, rows), _scalars(tiling, operands)
    dq = backward.dq(tiling, scalars, arrays)
    dbias = None
    if operands.bias is not None:
        dbias = backward.dbias(tiling, scalars, arrays)
        dbias = dbias[:, :, : call.q_len, : call.kv_len].astype(operands.bias.dtype)
    tiling = _tiling(call, "dkv")
    arrays = _arrange(tiling, operands, rows)
    dk, dv = backward.dkv(tiling, _scalars(tiling, operands, transposed=True), arrays)
    return Gradients(
        _unpad(dq, call.q_len, call.dtype),
        _unpad(dk, call.kv_len, call.dtype),
        _unpad(dv, call.kv_len, call.dtype),
        dbias,
    )


def _tiling(call: AttentionCall, which: Pass) -> Tiling:
    blocks = _block_sizes(call, which)
    # TPUs have no float16: compute in float32, which represents it exactly.
    call = replace(call, dtype="float32") if call.dtype == "float16" else call
    q_tile = LANES if call.q_len > LANES else _SUBLANES
    return Tiling(
        call,
        min(blocks.q, _round_up(call.q_len, q_tile)),
        min(blocks.k, _round_up(call.kv_len, LANES)),
        (1, 1) if call.mask is None else list_sizes(call),
    )


def _block_sizes(call: AttentionCall, which: Pass) -> BlockSizes:
    architecture = "interpret"
    if not call.interpret:
        newer = any(x in call.architecture for x in "67")
        architecture = "TPU v6 lite" if newer else "TPU v5 lite"
    kernel = "tpu" if call.dtype == "bfloat16" else "tpu-float32"
    wide = max(call.head_dim, call.v_head_dim)
    return block_sizes(Row(kernel, architecture, wide, call.causal, which))


def _arrange(tiling: Tiling, operands: Operands, rows: BackwardInputs | None = None) -> Arrays:
    """Convert the arrays to the kernels' layouts, zero-padded to whole blocks."""
    dtype = tiling.call.dtype
    q_len, kv_len = tiling.q_blocks * tiling.block_q, tiling.k_blocks * tiling.block_k

    def by_head(x: jax.Array, length: int, factor: float = 1.0) -> jax.Array:
        x = x.astype(dtype)
        return _pad((x * jnp.asarray(factor, dtype)).swapaxes(1, 2), 2, length)

    arrays = Arrays(
        q=by_head(operands.q, q_len, tiling.factors[0]),
        k=by_head(operands.k, kv_len),
        v=by_head(operands.v, kv_len),
    )
    if operands.q_segment_ids is not None and operands.kv_segment_ids is not None:
        arrays = arrays._replace(
            q_ids=_pad(operands.q_segment_ids[:, None], 2, q_len),
            kv_ids=_pad(operands.kv_segment_ids[:, None], 2, kv_len),
        )
    if operands.bias is not None:
        bias = operands.bias
        bias = bias if bias.dtype == jnp.bfloat16 else bias.astype(jnp.float32)
        arrays = arrays._replace(bias=_pad(_pad(bias, 2, q_len), 3, kv_len))
    if rows is not None:
        arrays = arrays._replace(
            out=by_head(rows.dout, q_len),
            # Padded rows get the weights exp(score - inf) = 0.
            lse=_pad(rows.lse[:, :, None], 3, q_len, jnp.inf),
            delta=_pad(rows.delta[:, :, None], 3, q_len),
        )
    return arrays


def _scalars(tiling: Tiling, operands: Operands, transposed: bool = False) -> Scalars:
    scalars = Scalars(
        offset=operands.q_offset,
        slopes=None if operands.alibi_slopes is None else operands.alibi_slopes.reshape(-1),
        seed=None if operands.dropout_seed is None else operands.dropout_seed.reshape(-1),
    )
    if tiling.call.mask is not None:
        sizes = tiling.block_q, tiling.block_k
        lists = block_lists(tiling.call, operands, *sizes, of_keys=transposed)
        order, full, listed = (x.reshape(-1) for x in lists)
        return scalars._replace(order=order, full=full, listed=listed)
    if operands.q_segment_ids is None or operands.kv_segment_ids is None:
        return scalars
    sides = [
        (operands.q_segment_ids, tiling.block_q),
        (operands.kv_segment_ids, tiling.block_k),
    ]
    (ids, block), (others, others_block) = reversed(sides) if transposed else sides
    start, stop = segment_blocks(ids, others, block, others_block)
    return scalars._replace(start=start.reshape(-1), stop=stop.reshape(-1))


def _pad(x: jax.Array, axis: int, length: int, value: float = 0) -> jax.Array:
    if x.shape[axis] == length:
        return x
    widths = [(0, length - n if a == axis else 0) for a, n in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=value)


def _unpad(x: jax.Array, length: int, dtype: str) -> jax.Array:
    return x[:, :, :length].swapaxes(1, 2).astype(dtype)


def _round_up(x: int, tile: int) -> int:
    return -(-x // tile) * tile


_BACKWARD = batched_backward(_backward)
BACKEND = AttentionBackend(
    run=with_custom_vjp(batched_forward(_forward), _BACKWARD),
    supports=_supports,
    backward=_BACKWARD,
    platforms=("tpu",),
    masks=True,
)
