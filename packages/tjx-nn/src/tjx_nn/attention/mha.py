"""Multi-head, grouped-query and multi-query attention.

`LatentAttention` (mla.py) and `SparseAttention` (sparse.py) share the interface: call, `decode` and
KV cache entries.

Axes in names: B batch, T time, S keys (of a cache: its slots), D d_model, N query heads,
K key heads, H head_dim, F features of all heads.
"""

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from tjx_nn.attention.chunks import chunk_segments
from tjx_nn.attention.head_gate import make_head_gate
from tjx_nn.attention.kv_cache import KVCache, cached_attention, update_cache
from tjx_nn.attention.rotation import rotate, scale_by_position
from tjx_nn.attention.value_mix import ValueMix
from tjx_nn.config import TransformerConfig
from tjx_nn.layers.make_layers import linear, make_norm, of_sizes
from tjx_nn.layers.norms import LayerNorm, RMSNorm
from tjx_nn.layers.position_encoding import alibi_slopes
from tjx_nn.layers.scan_layers import AuxLosses
from tjx_nn.layout import ShardedModule, make_param


class Attention(ShardedModule):
    """Multi-head attention with `n_kv_head` key and value heads (MHA, GQA, MQA).

    Query, key and value have separate kernels, so that each can be sharded by whole heads. Vaswani
    et al. 2017, "Attention Is All You Need"; Ainslie et al. 2023, "GQA".

    Parameters
    ----------
    config
        Configuration of the model, or the width `d_model` alone.
    n_head, n_kv_head
        Numbers of query and key heads, if not those of the configuration (of a width: 1).
    causal
        Whether a token attends only to itself and to earlier tokens.
    rngs
        Source of random initial values.

    Examples
    --------
    >>> from tjx_nn import Attention
    >>> attention = Attention(8, n_head=2, rngs=nnx.Rngs(0))
    >>> out, cache, _ = attention(jnp.ones((1, 3, 8)), positions=jnp.array([[0, 1, 0]]))
    >>> out.shape, cache["key"].shape
    ((1, 3, 8), (1, 3, 2, 4))
    """

    def __init__(
        self,
        config: TransformerConfig | int,
        *,
        n_head: int | None = None,
        n_kv_head: int | None = None,
        causal: bool = True,
        rngs: nnx.Rngs,
    ) -> None:
        config = of_sizes(config, n_head=n_head, n_kv_head=n_kv_head)
        self.config, self.causal, self.head_dim = config, causal, config.head_dim
        d, h = config.d_model, config.head_dim
        n, k = config.n_head * h, config.kv_heads * h
        bias = config.has_qkv_bias
        self.query = linear(config, ("embed", "heads"), (d, n), rngs=rngs, bias=bias)
        self.key = linear(config, ("embed", "kv_heads"), (d, k), rngs=rngs, bias=bias)
        self.value = linear(config, ("embed", "kv_heads"), (d, k), rngs=rngs, bias=bias)
        self.out = linear(config, ("heads", "embed"), (n, d), residual=True, rngs=rngs)
        self.query_norm = self._make_norm(n, "heads")
        self.key_norm = self._make_norm(k, "kv_heads")
        sinks = jnp.zeros(config.n_head, jnp.float32)
        self.sink_bias = make_param(sinks, ("heads",)) if config.attention_sinks else None
        self.gate = make_head_gate(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "#B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        window: int | None = None,
        bias: Float[Array, "#B N T S"] | None = None,
        value_mix: ValueMix | None = None,
        dropout_key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache, AuxLosses]:
        """Compute self-attention.

        Parameters
        ----------
        x
            Normalized residual stream.
        positions
            Position of each token for rotary embeddings; None counts from 0. Masks depend on the
            order of tokens in the row, not on positions.
        segment_ids
            Tokens attend only within their own segment; None is a single segment.
        window
            Size of the sliding window in tokens, the token itself included; None is unlimited.
        bias
            Added to the scores of queries and keys; None is 0.
        value_mix
            Mix with values that all blocks share; None does not mix.
        dropout_key
            PRNG key of dropout of attention weights; None disables it.

        Returns
        -------
        out
            Output of the layer, same shape as `x`.
        cache
            KV cache entries of these tokens: "key" and "value".
        aux_losses
            Empty; sparse attention returns its indexer loss here.
        """
        cache = self.keys_values(x, positions, window=window, value_mix=value_mix)
        if self.config.chunked_window and window is not None:
            segment_ids = chunk_segments(self.config, positions, segment_ids, window, x.shape)
        out = self.attend(
            x, cache, positions, segment_ids, segment_ids,
            window=window, bias=bias, dropout_key=dropout_key,
        )  # fmt: skip
        return out, cache, {}

    def attend(
        self,
        x: Float[Array, "B T D"],
        cache: KVCache,
        positions: Int[Array, "#B T"] | None,
        q_segment_ids: Int[Array, "B T"] | None,
        kv_segment_ids: Int[Array, "B S"] | None,
        *,
        window: int | None = None,
        bias: Float[Array, "#B N T S"] | None = None,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B T D"]:
        """Attend from `x` to keys and values, possibly of another sequence (cross attention).

        Parameters
        ----------
        x, positions, window, bias, dropout_key
            As for calling the layer.
        cache
            Result of `keys_values`.
        q_segment_ids, kv_segment_ids
            Segment ids of the tokens of `x` and of the keys; a token attends only to keys of its
            own segment. Both or neither.

        Returns
        -------
        array [batch, tokens, d_model]
            Output of the layer, in the dtype of `x`.
        """
        config = self.config
        rate = config.attention_dropout if dropout_key is not None else 0.0
        q_BTNH = self.queries(x, positions, window=window)
        with jax.named_scope("attention"):  # profiles group operations by this scope
            out_BTNH = self.layout.attend(
                q_BTNH,
                cache["key"],
                cache["value"],
                causal=self.causal,
                q_segment_ids=q_segment_ids,
                kv_segment_ids=kv_segment_ids,
                window=window,
                symmetric_window=config.symmetric_window and bool(window) and not self.causal,
                soft_cap=config.attention_soft_cap,
                scale=attention_scale(config, self.head_dim),
                bias=bias,
                alibi_slopes=model_alibi_slopes(config),
                sinks=self._sinks(),
                dropout_rate=rate,
                dropout_key=dropout_key if rate else None,
                implementation=config.attention_implementation,
            )
        return self._output(x, out_BTNH)

    def decode(
        self,
        x: Float[Array, "B T D"],
        cache: KVCache,
        positions: Int[Array, "B T"],
        *,
        window: int | None = None,
        bias: Float[Array, "B N T S"] | None = None,
        value_mix: ValueMix | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Attend causally from new tokens to the KV cache and to each other.

        Parameters
        ----------
        x
            Normalized residual stream of the new tokens, one or a few for each row.
        cache
            KV cache: the token at position p is in slot p, or in slot p % slots of the ring buffer
            of a windowed layer. Slots after the new tokens are ignored.
        positions
            Consecutive positions of the new tokens, [batch, new tokens].
        window, bias, value_mix
            As for calling the layer; the keys of the bias are the slots of the cache.

        Returns
        -------
        out
            Output of the layer, same shape as `x`.
        cache
            KV cache updated with the new tokens.
        """
        config = self.config
        entries = self.keys_values(x, positions, window=window, value_mix=value_mix)
        cache = update_cache(cache, entries, positions)
        out_BTNH = cached_attention(
            self.queries(x, positions, window=window),
            cache["key"],
            cache["value"],
            positions,
            window=window,
            chunked_window=config.chunked_window,
            soft_cap=config.attention_soft_cap,
            scale=attention_scale(config, self.head_dim),
            bias=bias,
            alibi_slopes=model_alibi_slopes(config),
            sinks=self._sinks(),
        )
        return self._output(x, out_BTNH), cache

    def queries(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "#B T"] | None,
        *,
        window: int | None = None,
    ) -> Float[Array, "B T N H"]:
        """Project tokens to queries, normalized and rotated if the model does so.

        Parameters
        ----------
        x
            Inputs of the layer, [batch, tokens, d_model].
        positions
            Position of each token, [batch or 1, tokens]; None without rotation.
        window
            Window of the layer, which selects its rotation.

        Returns
        -------
        array [batch, tokens, heads, head_dim]
            The queries.
        """
        q_BTNH = self._norm_and_rotate(self.query(x), self.query_norm, positions, window)
        if self.config.nope_temperature:
            return scale_by_position(self.config, q_BTNH, positions, window)
        return q_BTNH

    def keys_values(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "#B S"] | None,
        *,
        window: int | None = None,
        value_mix: ValueMix | None = None,
    ) -> KVCache:
        """Project tokens to "key" and "value", each [batch, tokens, kv_heads, head_dim].

        Parameters
        ----------
        x, positions, window
            As for `queries`.
        value_mix
            As for calling the layer.

        Returns
        -------
        dict
            The arrays "key" and "value".
        """
        k_BSKH = self._norm_and_rotate(self.key(x), self.key_norm, positions, window)
        v_BSKH = split_heads(self.value(x), self.head_dim)
        return {"key": k_BSKH, "value": v_BSKH if value_mix is None else value_mix(v_BSKH)}

    def _output(
        self, x: Float[Array, "B T D"], out_BTNH: Float[Array, "B T N H"]
    ) -> Float[Array, "B T D"]:
        if self.gate is not None:
            out_BTNH = self.gate(x, out_BTNH)
        return self.out(merge_heads(out_BTNH))

    def _sinks(self) -> Float[Array, " N"] | None:
        return None if self.sink_bias is None else self.gather(self.sink_bias, ("heads",))

    def _make_norm(self, features: int, axis: str) -> LayerNorm | RMSNorm | None:
        """Make the norm of queries or keys, of one head or of the features of all heads."""
        if not self.config.qk_norm or self.config.qk_norm_position == "after_rope":
            return None
        if self.config.qk_norm_features == "all":
            return make_norm(self.config, features, axis=axis)
        return make_norm(self.config, self.head_dim, axis="head_dim")

    def _norm_and_rotate(
        self,
        x: Float[Array, "B T F"],
        norm: LayerNorm | RMSNorm | None,
        positions: Array | None,
        window: int | None,
    ) -> Float[Array, "B T N H"]:
        over_all = self.config.qk_norm_features == "all"
        if norm is not None and over_all:
            x = norm(x)
        x_BTNH = split_heads(x, self.head_dim)
        if norm is not None and not over_all:
            x_BTNH = norm(x_BTNH)
        rope = self.config.block_rope(window) if self.config.positions == "rope" else None
        return x_BTNH if rope is None else rotate(self.config, x_BTNH, positions, rope)


def split_heads(x: Float[Array, "B T F"], head_dim: int) -> Float[Array, "B T N H"]:
    """Split features into heads."""
    return rearrange(x, "b t (n h) -> b t n h", h=head_dim)


def merge_heads(x: Float[Array, "B T N H"]) -> Float[Array, "B T F"]:
    """Concatenate the features of all heads."""
    return rearrange(x, "b t n h -> b t (n h)")


def attention_scale(config: TransformerConfig, head_dim: int) -> float:
    """Return the scale of attention scores, `config.attention_scale` resolved."""
    if config.attention_scale is not None:
        return config.attention_scale
    return 1 / math.sqrt(head_dim) if config.mup_base is None else 8 / head_dim


def model_alibi_slopes(config: TransformerConfig) -> Float[Array, " N"] | None:
    """Return the ALiBi slopes of a model, or None for other kinds of positions."""
    return jnp.asarray(alibi_slopes(config.n_head)) if config.positions == "alibi" else None
