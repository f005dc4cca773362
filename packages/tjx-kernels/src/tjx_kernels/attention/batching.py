"""Batching rules: run a vmapped attention kernel as one call with a larger batch.

A kernel that is not a plain `pallas_call` has no batching rule for `jax.vmap`. Here the vmapped
axis is merged into the batch axis.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from tjx_kernels.attention.backend import Backward, Forward, Gradients
from tjx_kernels.attention.call import AttentionCall, Operands


def batched_forward(forward: Forward) -> Forward:
    """Add a batching rule for `jax.vmap` to a forward pass."""

    def run(call: AttentionCall, operands: Operands) -> tuple[jax.Array, jax.Array]:
        plain = custom_vmap(lambda operands: forward(call, operands))

        @plain.def_vmap
        def _(size: int, batched: Any, operands: Operands) -> Any:
            merged_call, operands = _merge_operands(call, size, batched[0], operands)
            return _split(size, run(merged_call, operands)), (True, True)

        result: tuple[jax.Array, jax.Array] = plain(operands)
        return result

    return run


def batched_backward(backward: Backward) -> Backward:
    """Add a batching rule for `jax.vmap` to a backward pass."""

    def run(call: AttentionCall, operands: Operands, rows: Any) -> Gradients:
        plain = custom_vmap(lambda operands, rows: backward(call, operands, rows))

        @plain.def_vmap
        def _(size: int, batched: Any, operands: Operands, rows: Any) -> Any:
            merged_call, operands = _merge_operands(call, size, batched[0], operands)
            rows = jax.tree.map(lambda x, b: _merge(x, b, size), rows, batched[1])
            found = _split(size, run(merged_call, operands, rows))
            if call.bias is not None and call.bias[0] == 1:
                found = found._replace(bias=found.bias.sum(1, keepdims=True))
            return found, jax.tree.map(lambda _: True, found)

        result: Gradients = plain(operands, rows)
        return result

    return run


def _merge_operands(
    call: AttentionCall, size: int, batched: Any, operands: Operands
) -> tuple[AttentionCall, Operands]:
    merged = replace(call, batch=size * call.batch)
    if (mask := call.mask) is not None:
        own = call.batch  # not an array, which kernels could not capture
        merged = replace(
            merged, mask=lambda batch, *rest: mask(lax.rem(batch, jnp.int32(own)), *rest)
        )
    if operands.bias is not None:
        # Each vmapped call has its own bias gradient, also if the calls share the bias.
        axis = 1 if batched.bias else 0
        bias = operands.bias
        if bias.shape[axis] == 1:
            bias = jnp.repeat(bias, call.batch, axis=axis)
        operands = operands._replace(bias=bias)
        merged = replace(merged, bias=(merged.batch, bias.shape[axis + 1]))
    return merged, jax.tree.map(lambda x, b: _merge(x, b, size), operands, batched)


def _merge(x: jax.Array, batched: bool, size: int) -> jax.Array:
    if not batched:
        x = jnp.broadcast_to(x[None], (size, *x.shape))
    return x.reshape(-1, *x.shape[2:])


def _split(size: int, tree: Any) -> Any:
    return jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), tree)
