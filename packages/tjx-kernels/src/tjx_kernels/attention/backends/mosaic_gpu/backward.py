"""Backward pass of attention on Hopper: one kernel for dq, one for dk and dv.

There are no atomic additions, so the result is deterministic. In return both kernels compute the
scores and dP: 7 products per tile of scores (8 above head_dim 128), where one kernel with atomic
additions to dq needs 5. At equal product throughput that is at most 5/7 = 0.71 of its speed.
"""

import jax
import jax.numpy as jnp

from tjx_kernels.attention.backend import BackwardInputs, Gradients
from tjx_kernels.attention.backends.mosaic_gpu.dkv import dkv_kernel
from tjx_kernels.attention.backends.mosaic_gpu.dq import dq_kernel
from tjx_kernels.attention.backends.mosaic_gpu.pipeline import Inputs
from tjx_kernels.attention.backends.mosaic_gpu.scores import LOG2_E, padded
from tjx_kernels.attention.block_sizes import BlockSizes, Pass, Row, block_sizes
from tjx_kernels.attention.call import AttentionCall, Operands
from tjx_kernels.attention.masks import segment_blocks

# Columns of dk and dv together that fit a warpgroup's registers besides the scores. For more, one
# kernel computes dk and another one dv: 5 products per tile instead of 4.
COLUMNS_AT_ONCE = 256


def backward(call: AttentionCall, operands: Operands, rows: BackwardInputs) -> Gradients:
    """Compute the gradients of q, k and v; a `Backward` without a batching rule."""
    inputs = Inputs(
        q=padded(operands.q),
        k=padded(operands.k),
        v=padded(operands.v),
        dout=padded(rows.dout),
        rows=padded(jnp.stack([rows.lse * LOG2_E, rows.delta], axis=2), axis=3),
        offset=operands.q_offset,
    )
    q_ranges = kv_ranges = None
    for_q, for_kv = _sizes(call, "dq"), _sizes(call, "dkv")
    if operands.q_segment_ids is not None and operands.kv_segment_ids is not None:
        ids = operands.q_segment_ids, operands.kv_segment_ids
        inputs = inputs._replace(q_ids=padded(ids[0]), kv_ids=padded(ids[1]))
        q_ranges = segment_blocks(*ids, for_q.q * for_q.warps, for_q.k)
        kv_ranges = segment_blocks(*ids[::-1], for_kv.k * for_kv.warps, for_kv.q)
    dq = dq_kernel(call, for_q, _with_ranges(inputs, q_ranges))
    inputs = _with_ranges(inputs, kv_ranges)
    if call.head_dim + call.v_head_dim <= COLUMNS_AT_ONCE:
        found = dkv_kernel(call, for_kv, inputs, ("k", "v"))
    else:
        found = dkv_kernel(call, for_kv, inputs, ("k",)) | dkv_kernel(call, for_kv, inputs, ("v",))
    dk, dv = (found[name][:, : call.kv_len] for name in ("k", "v"))
    return Gradients(dq[:, : call.q_len], dk, dv, None)


def _sizes(call: AttentionCall, which: Pass) -> BlockSizes:
    architecture = "interpret" if call.interpret else call.architecture
    return block_sizes(Row("mosaic_gpu", architecture, call.head_dim, call.causal, which))


def _with_ranges(inputs: Inputs, ranges: tuple[jax.Array, jax.Array] | None) -> Inputs:
    return inputs if ranges is None else inputs._replace(ranges=jnp.stack(ranges, axis=-1))
