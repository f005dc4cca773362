"""What each head of each layer looks at: attention weights, computed by the model itself.

No fast attention ever holds the weights, so this is a model that runs slowly, with all of them in
memory, layer by layer. It is the layout that computes them: whatever a layer hands to attention
(turned, normalised, grouped, expanded from a latent) is what is recorded.

Axes in names: B batch, T time of queries, S keys, L layers, N query heads, K key heads, H head_dim,
V that of values.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from tjx_kernels import attention_reference
from tjx_nn.functional import Params, bind
from tjx_nn.layout import Layout
from tjx_nn.models.gpt_config import GPTConfig
from tjx_nn.tokens import Ids, check_tokens


def attention_weights(
    config: GPTConfig, params: Params, tokens: Ids
) -> tuple[Float32[Array, "L B N T S"], Float32[Array, "B T vocab"]]:
    """Return the attention of each head, and the logits that the model computed with it.

    Parameters
    ----------
    config
        A decoder; with sparse attention there are no weights of all keys.
    params
        Its parameters.
    tokens
        Token ids [batch, time]; the memory is that of layers * batch * heads * time ** 2 weights.

    Returns
    -------
    tuple
        Weights [layers, batch, query heads, queries, keys]: those of a query sum to 1, and are 0
        where it does not look. Logits [batch, time, vocabulary], as calling the model gives them.

    Raises
    ------
    ValueError
        If the model has sparse attention, or the tokens do not fit it.

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
            f"sparse.top_k is {config.sparse.top_k}: of sparse attention there are no weights of "
            "all keys; give a model without it"
        )
    check_tokens(config, tokens, None, vocab_size=config.vocab_size)
    found: tuple[Array, Array] = _run(config, params, tokens)
    return found


@functools.partial(jax.jit, static_argnums=0)
def _run(config: GPTConfig, params: Params, tokens: Int[Array, "B T"]) -> tuple[Array, Array]:
    recorder = _Recorder()
    model = bind(config, params, layout=recorder)
    # One by one: within a compiled loop over layers nothing could be recorded.
    x, _ = model.prefill(model.unstacked_blocks(), tokens)
    return jnp.stack(recorder.weights_BNTS), model.logits(x)


class _Recorder(Layout):
    """One device, where attention is dense and its weights are kept, a layer after the other."""

    def __init__(self) -> None:
        self.weights_BNTS: list[Array] = []

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K V"],
        **options: Any,
    ) -> Float[Array, "B T N V"]:
        """Attend to values that are one-hot by key, which gives the weights, and weigh `v`."""
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
