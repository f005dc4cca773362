"""An attention backend: dense causal attention.

Axes in names: B batch, T queries, S keys, N heads, H features.
"""

import jax
import jax.numpy as jnp

from tjx_kernels import AttentionBackend, register_backend
from tjx_kernels.attention.call import AttentionCall, Operands


def supports(call: AttentionCall) -> str | None:
    """Return why the backend does not support a call, or None."""
    options = (call.window, call.soft_cap, call.bias, call.segment_ids, call.alibi)
    plain = call.causal and call.heads == call.kv_heads and call.q_offset == 0
    if plain and not any(options) and not call.dropout_rate:
        return None
    return "it supports causal attention without other options only"


def run(call: AttentionCall, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Return the output [B, T, N, H] and the log-sum-exp of the scores [B, N, T]."""
    scores_BNTS = call.scale * jnp.einsum("BTNH,BSNH->BNTS", operands.q, operands.k)
    visible_TS = jnp.tri(call.q_len, call.kv_len, dtype=bool)
    scores_BNTS = jnp.where(visible_TS[None, None], scores_BNTS.astype(jnp.float32), -jnp.inf)
    lse_BNT = jax.nn.logsumexp(scores_BNTS, axis=-1)
    weights_BNTS = jnp.exp(scores_BNTS - lse_BNT[..., None]).astype(call.dtype)
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, operands.v), lse_BNT


register_backend(__name__, AttentionBackend(run, supports))
