"""Backward pass of attention on Hopper.

Up to head_dim 64 one kernel computes dq, dk and dv with five products per tile of scores: see
`gradients` and `dq_sum`. Above it dq has a kernel of its own, which repeats the scores and dP:
seven products, or eight above head_dim 128. Those kernels add nothing to device memory, so they are
deterministic; the fused kernel is with `call.deterministic`.

Tile model
----------
An estimate: no GPU has run these kernels. Cycles of an SM for 128 queries against 128 keys at
head_dim 64 (two compute warpgroups of 64 keys, two blocks of 64 queries each):

- tensor cores, 4096 FLOP a cycle: 512 for each product, 2560;
- shared memory, 128 bytes a cycle: S 512, dP 512, dv 256, dk 256, dq 512, dS 256, staging of dq
  512, copies of q and dout 256: 3072;
- exp, 16 a cycle: 1024; other float32 instructions, about 7 per score at 128 a cycle: 900.

Shared memory bounds the kernel: 0.83 of the peak of 989 TFLOP/s if everything overlaps. Per tile 32
KiB are added in the L2 cache. Shared memory: k, v 32 KiB, four stages of q and dout 64, dS 32,
staging 32. Registers: dk, dv 64 per thread, S and dP 32 each, dq 32.

Not overlapped, assumed: what follows the exchange of dS, when both warpgroups are in step (product
of dq, its staging, the first scores), about 1,600 cycles; and 10 % for barriers and the ends of a
thread block's loop. That is 5140 cycles a tile or 490 TFLOP/s (T >= 8k, causal), where cuDNN has
about 470 (taken as FlashAttention-3's 474 at 16k tokens). The goal is 0.8 of it, 380, or 6,640
cycles. At head_dim 128 seven products leave at most 5/7 of the speed of five: 280 to 360, where
cuDNN has about 560.
"""

import jax
import jax.numpy as jnp

from tjx_kernels.attention.backend import BackwardInputs, Gradients
from tjx_kernels.attention.backends.mosaic_gpu.dq import dq_kernel
from tjx_kernels.attention.backends.mosaic_gpu.dq_sum import in_order, turns
from tjx_kernels.attention.backends.mosaic_gpu.gradients import gradients_kernel, step_queries
from tjx_kernels.attention.backends.mosaic_gpu.pipeline import Inputs
from tjx_kernels.attention.backends.mosaic_gpu.scores import LOG2_E, padded
from tjx_kernels.attention.block_sizes import BlockSizes, Pass, Row, block_sizes
from tjx_kernels.attention.call import AttentionCall, Operands
from tjx_kernels.attention.masks import segment_blocks

# Largest head_dim for which one kernel computes dq, dk and dv. Above it ptxas finds too few
# registers and serializes the products (its message C7512), or spills.
FUSED_HEAD_DIM = 64
# Largest head_dim for which dk and dv fit a warpgroup's registers besides the scores.
TOGETHER_HEAD_DIM = 128


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
    ids = None
    found: dict[str, jax.Array] = {}
    sizes = _sizes(call, "dkv")
    keys = sizes.k * sizes.warps
    if operands.q_segment_ids is not None and operands.kv_segment_ids is not None:
        ids = operands.q_segment_ids, operands.kv_segment_ids
        inputs = inputs._replace(q_ids=padded(ids[0]), kv_ids=padded(ids[1], multiple=keys))
    for wanted in _kernels(call.head_dim):
        if ids is not None:
            queries = step_queries(sizes, wanted)
            ranges = segment_blocks(*ids[::-1], keys, queries)
            inputs = _with_ranges(inputs, ranges)
            if "q" in wanted and in_order(call):
                inputs = inputs._replace(turns=turns(call, ranges, inputs.offset, keys, queries))
        found |= gradients_kernel(call, sizes, inputs, wanted)
    if "q" not in found:
        sizes = _sizes(call, "dq")
        if ids is not None:
            inputs = _with_ranges(inputs, segment_blocks(*ids, sizes.q * sizes.warps, sizes.k))
        found["q"] = dq_kernel(call, sizes, inputs)
    dk, dv = (found[name][:, : call.kv_len] for name in ("k", "v"))
    return Gradients(found["q"][:, : call.q_len], dk, dv, None)


def _kernels(head_dim: int) -> list[tuple[str, ...]]:
    """Return the results of each kernel that owns keys."""
    if head_dim <= FUSED_HEAD_DIM:
        return [("q", "k", "v")]
    return [("k", "v")] if head_dim <= TOGETHER_HEAD_DIM else [("k",), ("v",)]


def _sizes(call: AttentionCall, which: Pass) -> BlockSizes:
    architecture = "interpret" if call.interpret else call.architecture
    return block_sizes(Row("mosaic_gpu", architecture, call.head_dim, call.causal, which))


def _with_ranges(inputs: Inputs, ranges: tuple[jax.Array, jax.Array]) -> Inputs:
    return inputs._replace(ranges=jnp.stack(ranges, axis=-1))
