"""Attention backend for NVIDIA's cuDNN through `jax.nn.dot_product_attention`.

It supports the calls that have the same semantics there. cuDNN's backward pass sums in an order
that may change from run to run, unless XLA_FLAGS has `--xla_gpu_deterministic_ops=true` or
`--xla_gpu_exclude_nondeterministic_ops=true`: then XLA selects cuDNN's deterministic algorithm
(openxla/xla pull request 14125).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tjx_kernels.attention.backend import AttentionBackend
from tjx_kernels.attention.call import AttentionCall, Operands


def _attend(call: AttentionCall, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    assert call.window is None or call.causal
    return jax.nn.dot_product_attention(
        *map(_batch_first, (q, k, v)),
        scale=call.scale,
        is_causal=call.causal,
        # cuDNN's left window excludes the query's own key.
        local_window_size=None if call.window is None else (call.window - 1, 0),
        implementation="cudnn",
    )


def _batch_first(x: jax.Array) -> jax.Array:
    """Return x unchanged; under `jax.vmap` the vmapped axis becomes axis 0.

    The batching rule of cuDNN's custom call requires axis 0. The reshape forces the move; adding
    and dropping an axis of length 1 costs nothing.
    """
    return x[None].reshape(x.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: AttentionCall, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return _attend(call, q, k, v)


def _forward(call: AttentionCall, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[Any, Any]:
    """Run cuDNN's forward rule and add checkpoint names to the residuals of its backward rule.

    The residuals are the operands, the output and the LSE; the LSE is recognized by its shape.
    """
    out, pull = jax.vjp(partial(_attend, call), q, k, v)
    # (checkpoint_name has no types in jax.)
    named: Any = checkpoint_name(out, "flash_attention_out")  # type: ignore[no-untyped-call]

    def name(x: Any) -> Any:
        if x is out:
            return named
        if x.shape == (call.batch, call.heads, call.q_len):
            return checkpoint_name(x, "flash_attention_lse")  # type: ignore[no-untyped-call]
        return x

    return named, jax.tree.map(name, pull)


def _backward(_call: AttentionCall, pull: Any, dout: jax.Array) -> tuple[jax.Array, ...]:
    gradients: tuple[jax.Array, ...] = pull(_batch_first(dout))
    return gradients


_attention.defvjp(_forward, _backward)


@partial(jax.jit, static_argnums=0, inline=True)
def _run(call: AttentionCall, operands: Operands) -> tuple[jax.Array, jax.Array]:
    assert not call.return_lse
    # The caller did not request the LSE. Return NaN so that accidental use is visible.
    no_lse = jnp.full((call.batch, call.heads, call.q_len), jnp.nan, call.accumulator)
    return _attention(call, operands.q, operands.k, operands.v), no_lse


def _supports(call: AttentionCall) -> str | None:
    """Return the reason why cuDNN 9.5 or later (the minimum of jax 0.11) cannot run a call.

    The limits are the checks of `jax.nn` and of cuDNN's frontend, and semantics that cuDNN
    lacks, defines differently, or provides only through a mask of q_len x kv_len.
    """
    nvidia = call.platform == "gpu" and call.architecture.startswith("sm_")
    generation = int(call.architecture.removeprefix("sm_")) if nvidia else 0
    largest = 256 if generation == 90 else 128
    # Blackwell has a deterministic backward pass from cuDNN 9.18.1 on (NVIDIA/TransformerEngine
    # pull request 2584); for head dims above 128 none is documented.
    undocumented = generation >= 100 or call.head_dim > 128
    reasons = {
        "it is not a Pallas kernel: leave out interpret": call.interpret,
        "needs an NVIDIA GPU of sm_80 or later": generation < 80,
        "needs bfloat16 or float16": call.dtype not in ("bfloat16", "float16"),
        "needs a head_dim that is a multiple of 8": call.head_dim % 8 != 0,
        f"needs a head_dim of at most {largest} on this GPU": call.head_dim > largest,
        "needs a v_head_dim equal to head_dim": call.v_head_dim != call.head_dim,
        "has no documented deterministic backward pass here, which XLA_FLAGS ask for": (
            call.deterministic and undocumented
        ),
        "its LSE has no derivative": call.return_lse,
        "segment ids would need a mask of q_len x kv_len": call.segment_ids,
        "has no soft cap": call.soft_cap is not None,
        "has no ALiBi slopes": call.alibi,
        "a bias with -inf is no mask to it": call.bias is not None,
        "drops other weights": call.dropout_rate > 0,
        "needs q_offset 0 under a causal mask or window": (
            (call.causal or call.window is not None) and call.q_offset != 0
        ),
        "has no window without a causal mask": call.window is not None and not call.causal,
        "has no window for more queries than keys": (
            call.window is not None and call.q_len > call.kv_len
        ),
        "has no causal mask for a single query": call.causal and call.q_len == 1,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


BACKEND = AttentionBackend(run=_run, supports=_supports, platforms=("gpu",))
