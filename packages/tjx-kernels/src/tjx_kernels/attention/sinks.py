"""Attention sinks: a logit of each head in the denominator of the softmax, for every backend.

With the log-sum-exp L of the scores of a row, a sink lowers the sum of the keys' weights from 1 to
exp(L) / (exp(L) + exp(sink)) = sigmoid(L - sink). A backend needs only its differentiable LSE.

Axes: B batch, T query length, N heads, V head_dim of the values.
"""

import jax


def apply_sinks(out_BTNV: jax.Array, lse_BNT: jax.Array, sinks_N: jax.Array) -> jax.Array:
    """Scale the output of attention without sinks by the weight that the sinks leave to the keys.

    Parameters
    ----------
    out_BTNV, lse_BNT
        Output and log-sum-exp of attention without sinks.
    sinks_N
        As for `flash_attention`, validated.

    Returns
    -------
    jax.Array
        The output with sinks, in the dtype of `out_BTNV`; 0 for dead rows.

    References
    ----------
    Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023, section 3.3;
    OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card", 2025, section 2.2.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> out, lse = jnp.ones((1, 1, 2, 1)), jnp.zeros((1, 2, 1))
    >>> print(apply_sinks(out, lse, jnp.array([0.0, -jnp.inf])).ravel())
    [0.5 1. ]
    """
    share_BNT = jax.nn.sigmoid(lse_BNT - sinks_N.astype(lse_BNT.dtype)[None, :, None])
    return (out_BTNV * share_BNT.swapaxes(1, 2)[..., None]).astype(out_BTNV.dtype)
