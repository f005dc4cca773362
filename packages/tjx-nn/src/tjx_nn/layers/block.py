"""Transformer block: attention and an MLP (or experts), each added to the residual stream.

Axes in names: B batch, T time, D d_model, N query heads, K key heads, H head_dim.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tjx_nn.attention.kv_cache import KVCache
from tjx_nn.attention.mha import Attention, split_heads
from tjx_nn.attention.mla import LatentAttention
from tjx_nn.attention.sparse import SparseAttention
from tjx_nn.attention.value_mix import ValueMix
from tjx_nn.config import TransformerConfig
from tjx_nn.layers.dropout import dropout
from tjx_nn.layers.gated_mlp import make_mlp
from tjx_nn.layers.make_layers import make_norm, of_sizes
from tjx_nn.layers.moe import Experts
from tjx_nn.layers.norms import LayerNorm, RMSNorm
from tjx_nn.layers.scan_layers import AuxLosses
from tjx_nn.layout import ShardedModule, gather_sequence, make_param, scatter_sequence


class Block(ShardedModule):
    """Transformer block with attention and an MLP or a mixture of experts.

    Parameters
    ----------
    config
        Configuration of the model, or the width `d_model` alone.
    n_head, n_kv_head, d_ff
        Heads, key heads and width of the MLP's hidden layer, if not those of the configuration (of
        a width: 1, 1 and 4 times the width).
    causal
        Whether a token attends only to itself and to earlier tokens.
    experts
        Whether a mixture of experts replaces the MLP.
    attention_norm
        Whether the block has a norm for its attention.
    embedding_skip
        Whether the block has trainable factors for `mix_embeddings`.
    value_mix
        Whether the block has trainable factors for shared values.
    rngs
        Source of random initial values.

    Examples
    --------
    >>> from tjx_nn import Block
    >>> block = Block(8, n_head=2, rngs=nnx.Rngs(0))
    >>> x, cache, aux_losses = block(jnp.ones((1, 3, 8)), segment_ids=jnp.array([[0, 0, 1]]))
    >>> x.shape
    (1, 3, 8)
    """

    def __init__(
        self,
        config: TransformerConfig | int,
        *,
        n_head: int | None = None,
        n_kv_head: int | None = None,
        d_ff: int | None = None,
        causal: bool = True,
        experts: bool = False,
        attention_norm: bool = True,
        embedding_skip: bool = False,
        value_mix: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        config = of_sizes(config, n_head=n_head, n_kv_head=n_kv_head, d_ff=d_ff)
        self.config = config
        self.ln_1 = make_norm(config) if attention_norm else None
        self.attention = make_attention(config, causal=causal, rngs=rngs)
        shared = config.parallel_block and config.parallel_norm == "shared"
        self.ln_2 = None if shared else make_norm(config)
        sandwich = config.norm_position == "sandwich"
        self.ln_1_out = make_norm(config) if sandwich else None
        self.ln_2_out = make_norm(config) if sandwich else None
        self.mlp = Experts(config, rngs=rngs) if experts else make_mlp(config, rngs=rngs)
        self.scale_1, self.scale_2 = layer_scale(config), layer_scale(config)
        skip = jnp.array([1.0, 0.0])
        self.skip_scale = make_param(skip, (None,)) if embedding_skip else None
        self.value_scale = make_param(jnp.full(2, 0.5), (None,)) if value_mix else None
        self.residual_scale = config.residual_scale / config.depth_multiplier  # CompleteP

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "#B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        window: int | None = None,
        bias: Float[Array, "#B N T T"] | None = None,
        shared_values: Float[Array, "B T K H"] | None = None,
        dropout_key: Array | None = None,
        drop_tokens: bool = True,
    ) -> tuple[Float[Array, "B T D"], KVCache, AuxLosses]:
        """Apply the block to the residual stream.

        Parameters
        ----------
        x
            Residual stream.
        positions, segment_ids, window, bias
            As for `Attention`.
        shared_values
            Values that a block with `value_mix` mixes into those of its attention; otherwise None.
        dropout_key
            PRNG key of dropout; None disables it.
        drop_tokens
            As for `Experts`.

        Returns
        -------
        x
            Residual stream after the block.
        cache
            KV cache entries of these tokens, as from `Attention`.
        aux_losses
            Auxiliary losses and statistics of the experts and of sparse attention.
        """
        attention_key, *residual_keys = split_key(dropout_key, 3)
        h = self._sublayer_input(x, self.ln_1)
        with jax.named_scope("attention_layer"):  # profiles group operations by this scope
            y, cache, aux_losses = self.attention(
                h, positions, segment_ids, window=window, bias=bias, dropout_key=attention_key,
                **self._value_mix(shared_values),
            )  # fmt: skip
        before, x = x, self._add(x, y, self.ln_1, self.scale_1, residual_keys[0], self.ln_1_out)
        y, mlp_losses = self._mlp(self._mlp_input(before, x, h), drop_tokens=drop_tokens)
        x = self._add(x, y, self.ln_2, self.scale_2, residual_keys[1], self.ln_2_out)
        return x, cache, aux_losses | mlp_losses

    def mix_embeddings(
        self, x: Float[Array, "B T D"], embedded: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """Return the weighted sum of the residual stream and its value before the first block.

        Parameters
        ----------
        x
            Residual stream before this block.
        embedded
            Residual stream before the first block.

        Returns
        -------
        array [batch, tokens, d_model]
            Input of this block: `x`, if the block has no factors.
        """
        if self.skip_scale is None:
            return x
        scales = self.gather(self.skip_scale, (None,)).astype(x.dtype)
        return scales[0] * x + scales[1] * embedded

    def values(self, x: Float[Array, "B T D"]) -> Float[Array, "B T K H"]:
        """Compute the values of the block's attention, without a mix.

        Parameters
        ----------
        x
            Residual stream.

        Returns
        -------
        float array [batch, tokens, kv_heads, head_dim]
            The values.
        """
        assert isinstance(self.attention, Attention)  # the configuration excludes latent attention
        v = self.attention.value(self._sublayer_input(x, self.ln_1))
        return split_heads(v, self.config.head_dim)

    def decode(
        self,
        x: Float[Array, "B T D"],
        cache: KVCache,
        positions: Int[Array, "B T"],
        *,
        window: int | None = None,
        shared_values: Float[Array, "B T K H"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Apply the block to new tokens with its KV cache; parameters as for `Attention.decode`.

        Parameters
        ----------
        x, cache, positions, window
            As for `Attention.decode`.
        shared_values
            Those of the new tokens, as for calling the block.

        Returns
        -------
        x : array [batch, tokens, d_model]
            Residual stream after the block.
        cache : dict
            The KV cache with the new tokens.
        """
        h = self._sublayer_input(x, self.ln_1)
        mix = self._value_mix(shared_values)
        y, cache = self.attention.decode(h, cache, positions, window=window, **mix)
        before, x = x, self._add(x, y, self.ln_1, self.scale_1, None, self.ln_1_out)
        y, _ = self._mlp(self._mlp_input(before, x, h), drop_tokens=False)
        return self._add(x, y, self.ln_2, self.scale_2, None, self.ln_2_out), cache

    def _value_mix(self, shared: Float[Array, "B T K H"] | None) -> dict[str, Any]:
        """Return the argument `value_mix` of attention, which latent attention does not have."""
        assert (shared is None) == (self.value_scale is None)
        if shared is None or self.value_scale is None:
            return {}
        return {"value_mix": ValueMix(self.gather(self.value_scale, (None,)), shared)}

    def _sublayer_input(
        self, x: Float[Array, "B T D"], norm: LayerNorm | RMSNorm | None
    ) -> Float[Array, "B T D"]:
        first = self.config.norm_position in ("pre", "sandwich")
        return gather_sequence(self.layout, norm(x) if first and norm is not None else x)

    def _mlp_input(
        self, before: Float[Array, "B T D"], after: Float[Array, "B T D"], h: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """Return the MLP's input from the stream before and after attention, whose input is `h`."""
        if self.ln_2 is None:
            return h
        return self._sublayer_input(before if self.config.parallel_block else after, self.ln_2)

    @jax.named_scope("residual")  # profiles and the planner group operations by this scope
    def _add(
        self,
        x: Float[Array, "B T D"],
        y: Float[Array, "B T D"],
        norm: LayerNorm | RMSNorm | None,
        scale: nnx.Param[Array] | None,
        dropout_key: Array | None = None,
        out_norm: LayerNorm | RMSNorm | None = None,
    ) -> Float[Array, "B T D"]:
        """Add a sublayer's output `y` to the residual stream: norms, layer scale and dropout."""
        y = scatter_sequence(self.layout, y)
        if self.config.norm_position == "output":
            out_norm = norm
        if out_norm is not None:
            y = out_norm(y)
        if scale is not None:
            y = y * self.gather(scale, ("embed",)).astype(y.dtype)[None, None]
        if dropout_key is not None:
            y = dropout(y, self.config.dropout, dropout_key, self.layout)
        y = y if self.residual_scale == 1 else self.residual_scale * y
        x = x + y
        return norm(x) if norm is not None and self.config.norm_position == "post" else x

    @jax.named_scope("mlp")  # profiles group operations by this scope
    def _mlp(
        self, h: Float[Array, "B T D"], *, drop_tokens: bool
    ) -> tuple[Float[Array, "B T D"], AuxLosses]:
        if isinstance(self.mlp, Experts):
            return self.mlp(h, drop_tokens=drop_tokens)
        return self.mlp(h), {}


def make_attention(
    config: TransformerConfig, *, causal: bool = True, rngs: nnx.Rngs
) -> Attention | LatentAttention:
    """Make the attention layer of a model: multi-head, latent (MLA) or sparse (DSA)."""
    if config.latent.kv_dim is not None:
        return LatentAttention(config, causal=causal, rngs=rngs)
    kind = Attention if config.sparse.top_k is None else SparseAttention
    return kind(config, causal=causal, rngs=rngs)


def layer_scale(config: TransformerConfig) -> nnx.Param[Array] | None:
    """Make the layer scale of a sublayer's output (`config.layer_scale`), or None without one."""
    if config.layer_scale is None:
        return None
    return make_param(jnp.full(config.d_model, config.layer_scale, jnp.float32), ("embed",))


def split_key(key: Array | None, count: int) -> list[Array | None]:
    """Split an optional PRNG key; None gives a list of None."""
    return [None] * count if key is None else list(jax.random.split(key, count))
