"""Attention through NVIDIA's cuDNN, as `jax.nn.dot_product_attention` offers it.

Nothing is computed here: calls whose meaning is the same there are passed on, others are refused.
cuDNN's backward pass may add in another order each time, unless XLA is given the flag
`--xla_gpu_deterministic_ops=true` or `--xla_gpu_exclude_nondeterministic_ops=true`: then XLA asks
cuDNN for its deterministic algorithm (openxla/xla pull request 14125).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tjx_kernels.attention.types import AttentionBackend, AttentionCall, Operands


def _attend(call: AttentionCall, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    assert call.window is None or call.causal
    return jax.nn.dot_product_attention(
        *map(_batch_first, (q, k, v)),
        scale=call.scale,
        is_causal=call.causal,
        # It counts the keys before the query's own.
        local_window_size=None if call.window is None else (call.window - 1, 0),
        implementation="cudnn",
    )


def _batch_first(x: jax.Array) -> jax.Array:
    """Do nothing, except under `jax.vmap`: its axis becomes the first, all that cuDNN's rule takes.

    Reshaping is what moves it there; that the axes of length 1 come and go is free.
    """
    return x[None].reshape(x.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: AttentionCall, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return _attend(call, q, k, v)


def _forward(call: AttentionCall, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[Any, Any]:
    """Run cuDNN's own forward rule, and name for rematerialisation what its backward rule needs.

    That is the operands, the output and the LSE, which is known by its shape alone.
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
    # The LSE goes nowhere. Should anything ever look at it, it shall notice.
    nothing = jnp.full((call.batch, call.heads, call.q_len), jnp.nan, call.accumulator)
    return _attention(call, operands.q, operands.k, operands.v), nothing


def _supports(call: AttentionCall) -> str | None:
    """Answer for cuDNN 9.5 or later, as jax 0.11 requires.

    The limits are those that `jax.nn` checks, those of cuDNN's frontend, and those of the meaning:
    what it cannot say, says otherwise, or says only with a mask of q_len x kv_len.
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


BACKEND = AttentionBackend(run=_run, backward=None, supports=_supports)
