"""Attention over a sequence that is spread over devices, by exchanging heads for tokens.

Each device holds a part of the tokens of all its heads; `all_to_all` gives it all tokens of a part
of these heads, it attends as if alone, and the results are exchanged back (Jacobs et al.,
"DeepSpeed Ulysses: system optimizations for enabling training of extreme long sequence transformer
models", 2023, section 3).
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tjx_kernels.attention import dropout
from tjx_kernels.attention.types import AttentionCall, Forward, Operands


def exchanged_call(call: AttentionCall, parts: int) -> AttentionCall:
    """Describe what a device computes, of whose tokens and heads `call` describes what it holds.

    Where `parts` is no divisor of the key heads they are repeated until it is one: as few times as
    possible, and each device still receives whole heads.
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


def exchanging(run: Forward, axes: tuple[str, ...], parts: int) -> Forward:
    """Give the function that computes with `run` on whole sequences; within `jax.shard_map`.

    Its q, k, v and segment ids are the device's part of the tokens. Bias and slopes are those of
    the heads that the device has after the exchange, dropout's seeds those of its first head
    before.
    """

    def attend(call: AttentionCall, operands: Operands) -> tuple[jax.Array, jax.Array]:
        whole = exchanged_call(call, parts)
        move: Any = partial(lax.all_to_all, axis_name=axes, tiled=True)

        def keys(x: jax.Array) -> jax.Array:
            repeats = whole.kv_heads * parts // call.kv_heads
            if repeats > 1:
                # The gradients of one head are summed in float32, and travel in the call's dtype.
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
