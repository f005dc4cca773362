"""Attention: every token gathers from others what it wants to know.

To change attention, begin here. `LatentAttention` and `SparseAttention`, beside this file, have the
same three methods: calling it, `decode`, and what its cache holds.

Axes in names: B batch, T time, S keys (of a cache: its slots), D d_model, N query heads, K key
heads, H head_dim.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from tjx_nn.attention.kv_cache import KVCache as KVCache
from tjx_nn.attention.kv_cache import cached_attention
from tjx_nn.attention.kv_cache import write as write
from tjx_nn.config import TransformerConfig
from tjx_nn.layers.linear import linear
from tjx_nn.layers.norms import make_norm
from tjx_nn.layers.position_encoding import alibi_slopes, apply_rope
from tjx_nn.layout import ShardedModule

# Scalars that a layer reports of itself: losses of experts and indexer, tokens that were dropped.
# Of a stack of layers they are arrays [layers].
AuxLosses = dict[str, Float32[Array, "..."]]


class TokenMetadata(NamedTuple):
    """Positions and segments of tokens, an argument of `Attention` and `Block`.

    Attributes
    ----------
    positions
        Of each token, for rotary positions.
    segment_ids
        Tokens see only their own segment (document); None is one for all.
    """

    positions: Int[Array, "#B T"]
    segment_ids: Int[Array, "B T"] | None = None


class Attention(ShardedModule):
    """Attention with as many key-value heads as the configuration says (MHA, GQA, MQA).

    Query, key and value have a kernel each, so that each can be sharded by whole heads. Vaswani et
    al. 2017, "Attention Is All You Need"; Ainslie et al. 2023, "GQA".

    Parameters
    ----------
    config
        Sizes and choices.
    causal
        Whether tokens see only themselves and what comes before.
    rngs
        Source of the initial values.

    Examples
    --------
    >>> from tjx_nn import Attention, GPTConfig, Where
    >>> attention = Attention(GPTConfig(n_head=2, d_model=8), rngs=nnx.Rngs(0))
    >>> out, cache, measures = attention(jnp.ones((1, 3, 8)), Where(jnp.arange(3)[None]))
    >>> out.shape, cache["key"].shape
    ((1, 3, 8), (1, 3, 2, 4))
    """

    def __init__(self, config: TransformerConfig, *, causal: bool = True, rngs: nnx.Rngs) -> None:
        self.config, self.causal = config, causal
        d, h = config.d_model, config.head_dim
        n, k = config.n_head * h, config.kv_heads * h
        self.query = linear(config, ("embed", "heads"), (d, n), rngs=rngs)
        self.key = linear(config, ("embed", "kv_heads"), (d, k), rngs=rngs)
        self.value = linear(config, ("embed", "kv_heads"), (d, k), rngs=rngs)
        self.out = linear(config, ("heads", "embed"), (n, d), residual=True, rngs=rngs)
        self.query_norm = make_norm(config, h, axis="head_dim") if config.qk_norm else None
        self.key_norm = make_norm(config, h, axis="head_dim") if config.qk_norm else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        where: TokenMetadata,
        *,
        window: int | None = None,
        dropout_key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache, AuxLosses]:
        """Attend from each token to those that it may see.

        Parameters
        ----------
        x
            What the tokens are asked about and answer with: the normalised residual stream.
        where
            Positions and segments.
        window
            Tokens that are looked back, the own one included; None is all.
        dropout_key
            Drops attention weights, if the configuration wants that.

        Returns
        -------
        tuple
            The output, what a cache keeps of these tokens, and measures (none here).
        """
        entries = self.keys_values(x, where)
        out = self.attend(x, where, entries, window=window, dropout_key=dropout_key)
        return out, entries, {}

    def attend(
        self,
        x: Float[Array, "B T D"],
        where: TokenMetadata,
        entries: KVCache,
        *,
        kv_segment_ids: Int[Array, "B S"] | None = None,
        window: int | None = None,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B T D"]:
        """Attend from tokens to keys and values, which may be those of other tokens."""
        config = self.config
        ids = where.segment_ids
        drops = config.attention_dropout if dropout_key is not None else 0.0
        q_BTNH = self.queries(x, where)
        with jax.named_scope("attention"):  # as profiles name it
            out_BTNH = self.layout.attend(
                q_BTNH,
                entries["key"],
                entries["value"],
                causal=self.causal,
                q_segment_ids=ids,
                kv_segment_ids=ids if kv_segment_ids is None else kv_segment_ids,
                window=window,
                soft_cap=config.attention_soft_cap,
                scale=attention_scale(config, config.head_dim),
                alibi_slopes=slopes(config),
                dropout_rate=drops,
                dropout_key=dropout_key if drops else None,
                implementation=config.attention_implementation,
            )
        return self.out(merge_heads(out_BTNH))

    def decode(
        self,
        x: Float[Array, "B T D"],
        cache: KVCache,
        where: TokenMetadata,
        *,
        window: int | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Attend from new tokens to those of the cache, and to each other; causal.

        Parameters
        ----------
        x
            Normalised residual stream of the new tokens, one or a few a row.
        cache
            The token at position p lies in slot p; with a window there may be fewer slots, and it
            lies in slot p % slots. Slots beyond the new tokens are not looked at.
        where
            Positions [batch, new] of the new tokens: those of a row follow each other.
        window
            As for calling the layer.

        Returns
        -------
        tuple
            The output, and the cache with the new tokens in it.
        """
        config = self.config
        cache = write(cache, self.keys_values(x, where), where.positions)
        q_BTNH, k_BSKH, v_BSKH = self.queries(x, where), cache["key"], cache["value"]
        out_BTNH = cached_attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            where.positions,
            window=window,
            soft_cap=config.attention_soft_cap,
            scale=attention_scale(config, config.head_dim),
            alibi_slopes=slopes(config),
        )
        return self.out(merge_heads(out_BTNH)), cache

    def queries(self, x: Float[Array, "B T D"], where: TokenMetadata) -> Float[Array, "B T N H"]:
        """Return the queries of tokens."""
        q_BTNH = self._heads(self.query(x))
        return self._apply_rope(
            q_BTNH if self.query_norm is None else self.query_norm(q_BTNH), where
        )

    def keys_values(self, x: Float[Array, "B S D"], where: TokenMetadata) -> KVCache:
        """Return the keys and values of tokens, each [batch, tokens, kv_heads, head_dim]."""
        k_BSKH = self._heads(self.key(x))
        k_BSKH = self._apply_rope(k_BSKH if self.key_norm is None else self.key_norm(k_BSKH), where)
        return {"key": k_BSKH, "value": self._heads(self.value(x))}

    def _apply_rope(
        self, x: Float[Array, "B T N H"], where: TokenMetadata
    ) -> Float[Array, "B T N H"]:
        if self.config.positions != "rope":
            return x
        return apply_rope(x, where.positions, self.config.rope)

    def _heads(self, x: Float[Array, "B T F"]) -> Float[Array, "B T N H"]:
        h = self.config.head_dim
        return x.reshape(*x.shape[:2], x.shape[2] // h, h)


def merge_heads(x: Float[Array, "B T N H"]) -> Float[Array, "B T F"]:
    """Return the features of all heads side by side."""
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3])


def attention_scale(config: TransformerConfig, head_dim: int) -> float:
    """Return the factor of scores: 1 / sqrt(head_dim), and with muP 8 / head_dim, equal at 64."""
    return 1 / math.sqrt(head_dim) if config.mup_base is None else 8 / head_dim


def slopes(config: TransformerConfig) -> Float[Array, " N"] | None:
    """Return ALiBi's slopes, if the configuration wants them."""
    return jnp.asarray(alibi_slopes(config.n_head)) if config.positions == "alibi" else None
