"""Sparse attention (DSA): a light indexer picks the keys that each query attends to.

Memory is linear in the sequence length: rows of queries are taken in chunks, one after the other,
and computed again in the backward pass.

Axes in names: B batch, T time of queries, S keys, P keys that are picked for a query, D d_model,
N query heads, K key heads, G query heads that share a key head, H head_dim, V head_dim of values.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int

from tjx_nn.attention.indexer import (
    EXACT,
    Indexer,
    IndexerOutput,
    SelectedKeys,
    index_scores,
    kl_divergence,
    near,
    select_cached_keys,
    select_top_k,
)
from tjx_nn.attention.mha import (
    Attention,
    AuxLosses,
    KVCache,
    TokenMetadata,
    attention_scale,
    merge_heads,
    slopes,
    write,
)
from tjx_nn.config import TransformerConfig

# Rows of queries that are computed at a time.
CHUNK = 128


class SparseAttention(Attention):
    """Attention of each query to the `top_k` keys that its indexer picks.

    A query that sees fewer attends to all of them; of keys that are worth the same, as are all that
    every head's ReLU cuts off, the first are picked. Parameters as for `Attention`.
    """

    def __init__(self, config: TransformerConfig, *, causal: bool = True, rngs: nnx.Rngs) -> None:
        super().__init__(config, causal=causal, rngs=rngs)
        self.indexer = Indexer(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        where: TokenMetadata,
        *,
        window: int | None = None,
        dropout_key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache, AuxLosses]:
        """Attend as `Attention` does; the measures are those of `sparse_attention`."""
        entries = self.keys_values(x, where)
        out_BTNH, aux_losses = sparse_attention(
            self.config,
            self.queries(x, where),
            entries["key"],
            entries["value"],
            self.indexer(x, where, entries["index_key"]),
            where,
            causal=self.causal,
            window=window,
            dropout_key=dropout_key,
        )
        return self.out(merge_heads(out_BTNH)), entries, aux_losses

    def decode(
        self,
        x: Float[Array, "B T D"],
        cache: KVCache,
        where: TokenMetadata,
        *,
        window: int | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Attend as `Attention` does, reading only the keys and values that are picked."""
        cache = write(cache, self.keys_values(x, where), where.positions)
        index = self.indexer(x, where, cache["index_key"])
        picked = select_cached_keys(self.config, index, where.positions, window)
        out_BTNH = attend_selected(
            self.config,
            self.queries(x, where),
            picked.of(cache["key"]),
            picked.of(cache["value"]),
            picked,
            scale=attention_scale(self.config, self.config.head_dim),
        )
        return self.out(merge_heads(out_BTNH)), cache

    def keys_values(self, x: Float[Array, "B S D"], where: TokenMetadata) -> KVCache:
        """Return what `Attention` does, and the indexer's keys."""
        return super().keys_values(x, where) | {"index_key": self.indexer.keys(x, where)}


@jax.named_scope("attention")  # as profiles name it
def sparse_attention(
    config: TransformerConfig,
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKV: Float[Array, "B S K V"],
    index: IndexerOutput,
    where: TokenMetadata,
    *,
    causal: bool,
    window: int | None,
    dropout_key: Array | None,
) -> tuple[Float[Array, "B T N V"], AuxLosses]:
    """Attend from all tokens to those that are picked of the ones that each of them may see.

    Returns
    -------
    tuple
        The output, and "indexer_loss": mean over tokens of the divergence KL(p || q) in nats, where
        p is the mean of all heads' attention to the keys picked, and q the softmax over them of
        what they are worth.
    """
    batch, tokens = q_BTNH.shape[:2]
    if batch == 0 or tokens == 0:
        out = jnp.zeros((*q_BTNH.shape[:3], v_BSKV.shape[3]), q_BTNH.dtype)
        return out, {"indexer_loss": jnp.zeros((), jnp.float32)}
    scale = attention_scale(config, q_BTNH.shape[3])
    count = -(-tokens // CHUNK)
    rows = -(-tokens // count)
    ids = where.segment_ids
    drops = dropout_key if config.attention_dropout else None
    keys = None if drops is None else jax.random.split(drops, count)

    def chunked(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, count * rows - tokens)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, count, rows, *x.shape[2:]), 1, 0)

    # Checkpointed, so that the backward pass keeps no array of queries x keys.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend(sums: tuple[Array, Array], chunk: Any) -> tuple[tuple[Array, Array], Array]:
        number, q, query, weight, q_ids, key = chunk
        row = number * rows + jnp.arange(rows)
        distance_1TS = row[None, :, None] - jnp.arange(tokens)[None, None]
        seen_BTS = near(distance_1TS, causal, window) & (row < tokens)[None, :, None]
        if ids is not None:
            seen_BTS = seen_BTS & (q_ids[:, :, None] == ids[:, None])
        worth_BTS = index_scores(IndexerOutput(query, weight, index.key))
        picked_BTS = select_top_k(config, worth_BTS, seen_BTS)
        out, p_BTS = _attend(config, q, k_BSKH, v_BSKV, picked_BTS, distance_1TS, scale, key)
        loss = sums[0] + kl_divergence(jax.lax.stop_gradient(p_BTS), worth_BTS, picked_BTS)
        return (loss, sums[1] + picked_BTS.any(-1).sum()), out

    chunks = jax.tree.map(chunked, (q_BTNH, index.query, index.weight, ids))
    zero = jnp.zeros((), jnp.float32)
    (loss, live), out = jax.lax.scan(attend, (zero, zero), (jnp.arange(count), *chunks, keys))
    out = jnp.moveaxis(out, 0, 1).reshape(batch, count * rows, *out.shape[3:])[:, :tokens]
    return out, {"indexer_loss": loss / live}


def attend_selected(
    config: TransformerConfig,
    q_BTNH: Float[Array, "B T N H"],
    k_BTPKH: Float[Array, "B T P K H"],
    v_BTPKV: Float[Array, "B T P K V"],
    picked: SelectedKeys,
    *,
    scale: float,
) -> Float[Array, "B T N V"]:
    """Attend from each query to keys of its own."""

    def alone(x: Array) -> Array:  # every query a row of the batch
        return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])

    q, k, v, seen, distance = map(alone, (q_BTNH, k_BTPKH, v_BTPKV, picked.seen, picked.distance))
    out, _ = _attend(config, q[:, None], k, v, seen[:, None], distance[:, None], scale)
    return out.reshape(*q_BTNH.shape[:3], v.shape[3])


def _attend(
    config: TransformerConfig,
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKV: Float[Array, "B S K V"],
    seen_BTS: Bool[Array, "B T S"],
    distance_BTS: Int[Array, "#B T S"],
    scale: float,
    dropout_key: Array | None = None,
) -> tuple[Float[Array, "B T N V"], Float32[Array, "B T S"]]:
    """Attend to the keys that are seen; also return the mean of the heads' weights."""
    batch, tokens, heads, features = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    group = (kv_heads, heads // kv_heads)
    q_BTKGH = q_BTNH.reshape(batch, tokens, *group, features)
    s_BKGTS = scale * jnp.einsum(
        "btkgh,bskh->bkgts", q_BTKGH, k_BSKH, precision=EXACT, preferred_element_type=jnp.float32
    )
    if config.attention_soft_cap is not None:
        s_BKGTS = config.attention_soft_cap * jnp.tanh(s_BKGTS / config.attention_soft_cap)
    if (slope_N := slopes(config)) is not None:
        slope_1KG11 = slope_N.reshape(1, *group, 1, 1)
        s_BKGTS = s_BKGTS - slope_1KG11 * jnp.abs(distance_BTS)[:, None, None]
    p_BKGTS = jax.nn.softmax(s_BKGTS, -1, where=seen_BTS[:, None, None])
    weights_BKGTS = p_BKGTS
    if dropout_key is not None:
        kept = jax.random.bernoulli(dropout_key, 1 - config.attention_dropout, p_BKGTS.shape)
        weights_BKGTS = jnp.where(kept, p_BKGTS / (1 - config.attention_dropout), 0)
    weights = weights_BKGTS.astype(v_BSKV.dtype)
    out = jnp.einsum("bkgts,bskv->btkgv", weights, v_BSKV, precision=EXACT)
    return out.reshape(batch, tokens, heads, v_BSKV.shape[3]), p_BKGTS.mean((1, 2))
