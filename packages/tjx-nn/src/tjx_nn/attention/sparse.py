"""Sparse attention: each query attends to the top-k keys of a light indexer (DSA) or of its scores.

Memory is linear in the sequence length: queries are processed in chunks, one after the other, and
recomputed in the backward pass.

Axes in names: B batch, T time of queries, S keys, P selected keys of a query, D d_model,
N query heads, K key heads, G query heads of a key head, H head_dim, V head_dim of values, C chunks.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int

from tjx_nn.attention.indexer import (
    EXACT,
    Indexer,
    IndexerOutput,
    SelectedKeys,
    index_scores,
    kl_divergence,
    select_cached_keys,
    select_top_k,
    visible_keys,
)
from tjx_nn.attention.kv_cache import KVCache, update_cache
from tjx_nn.attention.mha import Attention, attention_scale, model_alibi_slopes
from tjx_nn.attention.value_mix import ValueMix
from tjx_nn.config import TransformerConfig
from tjx_nn.layers.scan_layers import AuxLosses

# Queries of a chunk.
CHUNK = 128


class SparseAttention(Attention):
    """Attention to the `config.sparse.top_k` keys with the highest scores.

    The indexer scores the keys of all heads; without one, the attention scores of each head select
    its keys. A query with fewer visible keys attends to all of them. Ties (scores that the ReLU of
    every indexer head cuts off) select the first keys. Parameters as for `Attention`.

    Parameters
    ----------
    config, causal, rngs
        As for `Attention`; `config.sparse` must be set.

    Examples
    --------
    >>> from tjx_nn import GPTConfig, SparseAttention, SparseConfig
    >>> config = GPTConfig(n_head=2, d_model=8, sparse=SparseConfig(top_k=2))
    >>> out, _, aux_losses = SparseAttention(config, rngs=nnx.Rngs(0))(jnp.ones((1, 4, 8)))
    >>> out.shape, list(aux_losses)
    ((1, 4, 8), ['indexer_loss'])
    """

    def __init__(self, config: TransformerConfig, *, causal: bool = True, rngs: nnx.Rngs) -> None:
        super().__init__(config, causal=causal, rngs=rngs)
        self.indexer = Indexer(config, rngs=rngs) if config.sparse.indexer else None

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
        """Compute sparse self-attention without a bias; see `Attention` and `sparse_attention`."""
        assert bias is None  # the configuration excludes it
        cache = self.keys_values(x, positions, window=window, value_mix=value_mix)
        indexer = self.indexer
        out_BTNH, aux_losses = sparse_attention(
            self.config,
            self.queries(x, positions, window=window),
            cache["key"],
            cache["value"],
            None if indexer is None else indexer(x, positions, cache["index_key"]),
            segment_ids,
            causal=self.causal,
            window=window,
            dropout_key=dropout_key,
            sinks=self._sinks(),
        )
        return self._output(x, out_BTNH), cache, aux_losses

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
        """Decode as `Attention.decode`; with an indexer, read only the selected keys and values."""
        assert bias is None  # the configuration excludes it
        entries = self.keys_values(x, positions, window=window, value_mix=value_mix)
        cache = update_cache(cache, entries, positions)
        q_BTNH = self.queries(x, positions, window=window)
        scale = attention_scale(self.config, self.config.head_dim)
        if self.indexer is None:
            out_BTNH = attend_top_k(
                self.config, q_BTNH, cache["key"], cache["value"], positions,
                window=window, scale=scale, sinks=self._sinks(),
            )  # fmt: skip
        else:
            index = self.indexer(x, positions, cache["index_key"])
            selected = select_cached_keys(self.config, index, positions, window)
            k_BTPKH, v_BTPKH = selected.gather(cache["key"]), selected.gather(cache["value"])
            out_BTNH = attend_selected(self.config, q_BTNH, k_BTPKH, v_BTPKH, selected, scale=scale)
        return self._output(x, out_BTNH), cache

    def keys_values(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "#B S"] | None,
        *,
        window: int | None = None,
        value_mix: ValueMix | None = None,
    ) -> KVCache:
        """Project tokens to "key" and "value", and to "index_key" with an indexer."""
        entries = super().keys_values(x, positions, window=window, value_mix=value_mix)
        if self.indexer is None:
            return entries
        return entries | {"index_key": self.indexer.keys(x, positions)}


@jax.named_scope("attention")  # profiles group operations by this scope
def sparse_attention(
    config: TransformerConfig,
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKV: Float[Array, "B S K V"],
    index: IndexerOutput | None,
    segment_ids: Int[Array, "B T"] | None,
    *,
    causal: bool,
    window: int | None,
    dropout_key: Array | None,
    sinks: Float[Array, " N"] | None = None,
) -> tuple[Float[Array, "B T N V"], AuxLosses]:
    """Compute attention of every query to its top-k visible keys, and the indexer loss.

    Without an `index`, the attention scores of each head select its keys.

    Returns
    -------
    out
        Output of the heads, in the dtype of `v_BSKV`.
    aux_losses
        "indexer_loss": mean over tokens of KL(p || q) in nats, where p is the mean over heads of
        the attention weights of the selected keys, and q the softmax of their indexer scores.
        Empty without an `index`.
    """
    batch, tokens = q_BTNH.shape[:2]
    if batch == 0 or tokens == 0:
        out = jnp.zeros((*q_BTNH.shape[:3], v_BSKV.shape[3]), q_BTNH.dtype)
        return out, {} if index is None else {"indexer_loss": jnp.zeros((), jnp.float32)}
    scale = attention_scale(config, q_BTNH.shape[3])
    count = -(-tokens // CHUNK)
    rows = -(-tokens // count)
    weights_key = dropout_key if config.attention_dropout else None
    keys = None if weights_key is None else jax.random.split(weights_key, count)
    symmetric = config.symmetric_window and not causal

    def chunked(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, count * rows - tokens)) + ((0, 0),) * (x.ndim - 2))
        return rearrange(x, "b (c t) ... -> c b t ...", c=count)

    # Checkpointed: otherwise the residuals would include arrays of queries x keys.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend(sums: tuple[Array, Array], chunk: Any) -> tuple[tuple[Array, Array], Array]:
        number, q, query_and_weight, q_segment_ids, key = chunk
        row = number * rows + jnp.arange(rows)
        distance_1TS = row[None, :, None] - jnp.arange(tokens)[None, None]
        visible_BTS = visible_keys(distance_1TS, causal, window, symmetric=symmetric)
        visible_BTS = visible_BTS & (row < tokens)[None, :, None]
        if segment_ids is not None:
            visible_BTS = visible_BTS & (q_segment_ids[:, :, None] == segment_ids[:, None])
        if index is None:
            out, _ = _attend(
                config, q, k_BSKH, v_BSKV, visible_BTS, distance_1TS, scale, key, sinks
            )
            return sums, out
        query, weight = query_and_weight
        scores_BTS = index_scores(IndexerOutput(query, weight, index.key))
        selected_BTS = select_top_k(config, scores_BTS, visible_BTS)
        out, p_BTS = _attend(config, q, k_BSKH, v_BSKV, selected_BTS, distance_1TS, scale, key)
        loss = sums[0] + kl_divergence(jax.lax.stop_gradient(p_BTS), scores_BTS, selected_BTS)
        return (loss, sums[1] + selected_BTS.any(-1).sum()), out

    chunks = jax.tree.map(chunked, (q_BTNH, None if index is None else index[:2], segment_ids))
    zero = jnp.zeros((), jnp.float32)
    (loss, n_queries), out = jax.lax.scan(attend, (zero, zero), (jnp.arange(count), *chunks, keys))
    out = rearrange(out, "c b t n v -> b (c t) n v")[:, :tokens]
    return out, {} if index is None else {"indexer_loss": loss / n_queries}


def attend_top_k(
    config: TransformerConfig,
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKV: Float[Array, "B S K V"],
    positions: Int[Array, "B T"],
    *,
    window: int | None,
    scale: float,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N V"]:
    """Compute attention of new tokens to the keys of a KV cache with the highest scores."""
    distance_BTS = positions[:, :, None] - jnp.arange(k_BSKH.shape[1])[None, None]
    visible_BTS = visible_keys(distance_BTS, True, window)
    out, _ = _attend(config, q_BTNH, k_BSKH, v_BSKV, visible_BTS, distance_BTS, scale, sinks=sinks)
    return out


def attend_selected(
    config: TransformerConfig,
    q_BTNH: Float[Array, "B T N H"],
    k_BTPKH: Float[Array, "B T P K H"],
    v_BTPKV: Float[Array, "B T P K V"],
    selected: SelectedKeys,
    *,
    scale: float,
) -> Float[Array, "B T N V"]:
    """Compute attention of each query to its own selected keys."""

    def fold(x: Array) -> Array:  # every query becomes a row of the batch
        return rearrange(x, "b t ... -> (b t) ...")

    q, k, v, visible, distance = map(
        fold, (q_BTNH, k_BTPKH, v_BTPKV, selected.visible, selected.distance)
    )
    out, _ = _attend(config, q[:, None], k, v, visible[:, None], distance[:, None], scale)
    return out.reshape(*q_BTNH.shape[:3], v.shape[3])


def _attend(
    config: TransformerConfig,
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKV: Float[Array, "B S K V"],
    visible_BTS: Bool[Array, "#B T S"],
    distance_BTS: Int[Array, "#B T S"],
    scale: float,
    dropout_key: Array | None = None,
    sinks: Float[Array, " N"] | None = None,
) -> tuple[Float[Array, "B T N V"], Float32[Array, "B T S"]]:
    """Compute masked attention; also return the attention weights, averaged over heads.

    Without an indexer, each head attends to its visible keys with the highest scores.
    """
    kv_heads = k_BSKH.shape[2]
    q_BTKGH = rearrange(q_BTNH, "b t (k g) h -> b t k g h", k=kv_heads)
    s_BKGTS = scale * jnp.einsum(
        "btkgh,bskh->bkgts", q_BTKGH, k_BSKH, precision=EXACT, preferred_element_type=jnp.float32
    )
    if config.attention_soft_cap is not None:
        s_BKGTS = config.attention_soft_cap * jnp.tanh(s_BKGTS / config.attention_soft_cap)
    if (slopes_N := model_alibi_slopes(config)) is not None:
        slopes_1KG11 = rearrange(slopes_N, "(k g) -> 1 k g 1 1", k=kv_heads)
        s_BKGTS = s_BKGTS - slopes_1KG11 * jnp.abs(distance_BTS)[:, None, None]
    visible_BKGTS = visible_BTS[:, None, None]
    if not config.sparse.indexer:
        visible_BKGTS = select_top_k(config, s_BKGTS, visible_BKGTS)
    p_BKGTS = jax.nn.softmax(s_BKGTS, -1, where=visible_BKGTS)
    if sinks is not None:
        sinks_1KG11 = rearrange(sinks, "(k g) -> 1 k g 1 1", k=kv_heads)
        log_sum = jax.nn.logsumexp(s_BKGTS, -1, where=visible_BKGTS, keepdims=True)
        p_BKGTS = p_BKGTS * jax.nn.sigmoid(log_sum - sinks_1KG11)
    weights_BKGTS = p_BKGTS
    if dropout_key is not None:
        keep = jax.random.bernoulli(dropout_key, 1 - config.attention_dropout, p_BKGTS.shape)
        weights_BKGTS = jnp.where(keep, p_BKGTS / (1 - config.attention_dropout), 0)
    weights = weights_BKGTS.astype(v_BSKV.dtype)
    out = jnp.einsum("bkgts,bskv->btkgv", weights, v_BSKV, precision=EXACT)
    return rearrange(out, "b t k g v -> b t (k g) v"), p_BKGTS.mean((1, 2))
