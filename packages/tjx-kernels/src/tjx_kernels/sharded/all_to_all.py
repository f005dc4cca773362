"""Context parallelism by all-to-all (DeepSpeed-Ulysses): exchange heads for tokens.

Each device holds some tokens of all its heads. An all-to-all gives it all tokens of some of these
heads, it computes attention without further communication, and a second all-to-all restores the
sharding (Jacobs et al., "DeepSpeed Ulysses: system optimizations for enabling training of extreme
long sequence transformer models", 2023, section 3).
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tjx_kernels.attention import dropout
from tjx_kernels.attention.backend import Forward
from tjx_kernels.attention.call import AttentionCall, Operands


def exchanged_call(call: AttentionCall, parts: int) -> AttentionCall:
    """Return a device's call after the all-to-all, given its call before.

    If `parts` does not divide the key heads, they are repeated as few times as possible until it
    does, so that each device receives whole heads.
    """
    heads = call.heads // parts
    return replace(
        call,
        q_len=call.q_len * parts,
        kv_len=call.kv_len * parts,
        heads=heads,
        kv_heads=math.lcm(call.kv_heads, parts) // parts,
        bias=call.bias and (call.bias[0], min(call.bias[1], heads)),
    )


def with_all_to_all(run: Forward, axes: tuple[str, ...], parts: int) -> Forward:
    """Wrap `run`, which takes whole sequences, in all-to-alls; inside `jax.shard_map`.

    q, k, v and segment ids are sharded by tokens. Bias and slopes belong to the heads that the
    device has after the all-to-all, dropout seeds to its first head before.
    """

    def attend(call: AttentionCall, operands: Operands) -> tuple[jax.Array, jax.Array]:
        whole = exchanged_call(call, parts)
        move: Any = partial(lax.all_to_all, axis_name=axes, tiled=True)

        def keys(x: jax.Array) -> jax.Array:
            repeats = whole.kv_heads * parts // call.kv_heads
            if repeats > 1:
                # Gradients of a head are summed in float32 and sent in the call's dtype.
                x = jnp.repeat(x.astype(call.accumulator), repeats, axis=2).astype(call.dtype)
            moved: jax.Array = move(x, split_axis=2, concat_axis=1)
            return moved

        def ids(x: Any) -> Any:
            return None if x is None else lax.all_gather(x, axes, axis=1, tiled=True)

        seed = operands.dropout_seed
        if seed is not None:
            seed = dropout.from_head(seed, lax.axis_index(axes) * whole.heads)
        operands = operands._replace(
            q=move(operands.q, split_axis=2, concat_axis=1),
            k=keys(operands.k),
            v=keys(operands.v),
            q_segment_ids=ids(operands.q_segment_ids),
            kv_segment_ids=ids(operands.kv_segment_ids),
            dropout_seed=seed,
        )
        out, lse = run(whole, operands)
        return move(out, split_axis=1, concat_axis=2), move(lse, split_axis=2, concat_axis=1)

    return attend
