"""Attention weights of every layer and head of a decoder, for analysis.

Fast attention kernels never materialize the weights. A `Layout` whose `attend` computes dense
attention records them from the exact queries and keys of each layer (after RoPE, QK-norm, GQA and
latent projections).

Axes in names: B batch, T time of queries, S keys, L layers, N query heads, K key heads, H head_dim,
V that of values.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from tjx_kernels import attention_reference
from tjx_nn.binding import Params, bind
from tjx_nn.inputs import Ids
from tjx_nn.layers.embedding import check_tokens
from tjx_nn.layout import Layout
from tjx_nn.models.gpt_config import GPTConfig


def attention_weights(
    config: GPTConfig, params: Params, tokens: Ids
) -> tuple[Float32[Array, "L B N T S"], Float32[Array, "B T vocab"]]:
    """Compute the attention weights of every head and the logits of the same forward pass.

    Parameters
    ----------
    config
        Configuration of a decoder without sparse attention.
    params
        Parameters of the model.
    tokens
        Token ids, [batch, tokens]. Memory grows with layers * batch * heads * tokens ** 2.

    Returns
    -------
    weights : float32 [layers, batch, heads, tokens, tokens]
        Attention weights; each query's weights sum to 1, with attention sinks to less, and are 0
        for masked keys.
    logits : float32 [batch, tokens, vocabulary]
        Logits as from calling the model.

    Raises
    ------
    ValueError
        If the model has sparse attention, or the tokens are invalid for it.

    Examples
    --------
    >>> import jax
    >>> from tjx_nn import GPTConfig, attention_weights, init
    >>> config = GPTConfig(vocab_size=11, max_seq_len=8, n_layer=2, n_head=2, d_model=4)
    >>> params = jax.jit(init, static_argnums=0)(config, jax.random.key(0))
    >>> weights, _ = attention_weights(config, params, jnp.array([[1, 2, 3]]))
    >>> weights.shape, weights[0, 0, 0, 0].tolist()
    ((2, 1, 2, 3, 3), [1.0, 0.0, 0.0])
    """
    if config.sparse.top_k is not None:
        raise ValueError(
            f"config.sparse.top_k: got {config.sparse.top_k}; expected None, as sparse attention "
            "has no weights of all keys; use a model with dense attention"
        )
    check_tokens(config, tokens, None, vocab_size=config.vocab_size)
    weights_and_logits: tuple[Array, Array] = _run(config, params, tokens)
    return weights_and_logits


@functools.partial(jax.jit, static_argnums=0)
def _run(config: GPTConfig, params: Params, tokens: Int[Array, "B T"]) -> tuple[Array, Array]:
    recorder = _Recorder()
    model = bind(config, params, layout=recorder)
    # Unrolled: values cannot leave the body of a scan over layers by a side effect.
    x, _ = model.prefill(model.unstacked_blocks(), tokens)
    return jnp.stack(recorder.weights_BNTS), model.logits(x)


class _Recorder(Layout):
    """Single-device layout that computes dense attention and records the weights of each layer."""

    def __init__(self) -> None:
        self.weights_BNTS: list[Array] = []

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K V"],
        **options: Any,
    ) -> Float[Array, "B T N V"]:
        """Compute weights as attention to one-hot values, record them, and apply them to `v`."""
        del options["implementation"]
        batch, keys, heads = v.shape[:3]
        one_hot = jnp.broadcast_to(jnp.eye(keys)[None, :, None], (batch, keys, heads, keys))
        weights_BTNS = attention_reference(
            q.astype(jnp.float32), k.astype(jnp.float32), one_hot, **options
        )
        assert isinstance(weights_BTNS, Array)
        self.weights_BNTS.append(weights_BTNS.swapaxes(1, 2))
        v_BSNV = jnp.repeat(v.astype(jnp.float32), q.shape[2] // heads, axis=2)
        out = jnp.einsum(
            "btns,bsnv->btnv", weights_BTNS, v_BSNV, precision=jax.lax.Precision.HIGHEST
        )
        return out.astype(v.dtype)
