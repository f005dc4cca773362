"""The indexer of sparse attention: what each key is worth to each query, and which are picked.

Axes in names: B batch, T time of queries, S keys, P keys that are picked for a query, D d_model,
J heads of the indexer, I their features.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int

from tjx_nn.attention.mha import TokenMetadata
from tjx_nn.config import TransformerConfig
from tjx_nn.layers.linear import linear
from tjx_nn.layers.norms import make_norm
from tjx_nn.layers.position_encoding import apply_rope

# float32 stays float32 on every platform: the same keys are picked with and without a cache.
EXACT = jax.lax.Precision.HIGHEST


class IndexerOutput(NamedTuple):
    """What the indexer makes of tokens; [batch, queries or keys, ...].

    Key s is worth sum_j weight[t, j] * relu(query[t, j] . key[s]) to query t.
    """

    query: Float[Array, "B T J I"]
    weight: Float[Array, "B T J"]
    key: Float[Array, "B S I"]


class Indexer(nnx.Module):
    """Says how much each key is worth to each query; DeepSeek-AI 2025, "DeepSeek-V3.2".

    It learns from its own loss alone: nothing of it reaches what it reads, and no other loss
    reaches it.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        d, heads, features = config.d_model, config.sparse.n_head, config.sparse.head_dim
        axes = ("embed", "indexer")
        self.query = linear(
            config, axes, (d, heads * features), bias=False, float8=False, rngs=rngs
        )
        self.key = linear(config, axes, (d, features), bias=False, float8=False, rngs=rngs)
        self.weight = linear(config, axes, (d, heads), bias=False, float8=False, rngs=rngs)
        self.key_norm = make_norm(config, features, axis="head_dim")

    def __call__(
        self, x: Float[Array, "B T D"], where: TokenMetadata, key: Float[Array, "B S I"]
    ) -> IndexerOutput:
        """Return the index of queries `x`, with keys that may be those of other tokens."""
        x = jax.lax.stop_gradient(x)
        shape = (*x.shape[:2], self.config.sparse.n_head, self.config.sparse.head_dim)
        return IndexerOutput(
            self._apply_rope(self.query(x).reshape(shape), where), self.weight(x), key
        )

    def keys(self, x: Float[Array, "B S D"], where: TokenMetadata) -> Float[Array, "B S I"]:
        """Return the keys of tokens."""
        key = self.key_norm(self.key(jax.lax.stop_gradient(x)))
        return self._apply_rope(key[:, :, None], where)[:, :, 0]

    def _apply_rope(
        self, x: Float[Array, "B T J I"], where: TokenMetadata
    ) -> Float[Array, "B T J I"]:
        if self.config.positions != "rope":
            return x
        return apply_rope(x, where.positions, dataclasses.replace(self.config.rope, dim=None))


def near(distance: Int[Array, "#B T S"], causal: bool, window: int | None) -> Bool[Array, "#B T S"]:
    """Say which keys a query may see, by how far they lie before it."""
    seen = distance >= 0 if causal else jnp.ones(distance.shape, bool)
    return seen if window is None else seen & (distance < window)


def index_scores(index: IndexerOutput) -> Float32[Array, "B T S"]:
    """Return what each key is worth to each query."""
    scores_BJTS = jnp.einsum(
        "btji,bsi->bjts",
        index.query,
        index.key,
        precision=EXACT,
        preferred_element_type=jnp.float32,
    )
    weight_BTJ = index.weight.astype(jnp.float32)
    return jnp.einsum("btj,bjts->bts", weight_BTJ, jax.nn.relu(scores_BJTS), precision=EXACT)


def select_top_k(
    config: TransformerConfig, worth_BTS: Float32[Array, "B T S"], seen_BTS: Bool[Array, "#B T S"]
) -> Bool[Array, "B T S"]:
    """Say which of the keys that a query may see are worth most to it, up to `top_k` of them."""
    seen_BTS = jnp.broadcast_to(seen_BTS, worth_BTS.shape)
    batch, tokens, keys = worth_BTS.shape
    if config.sparse.top_k is None or config.sparse.top_k >= keys:
        return seen_BTS
    worth_BTS = jax.lax.stop_gradient(jnp.where(seen_BTS, worth_BTS, -jnp.inf))
    best_BTP = jax.lax.top_k(worth_BTS, config.sparse.top_k)[1]
    rows, columns = jnp.arange(batch)[:, None, None], jnp.arange(tokens)[None, :, None]
    nothing_BTS = jnp.zeros(worth_BTS.shape, bool)
    # `top_k` returns each key once, so that no atomics are needed on GPUs.
    picked_BTS = nothing_BTS.at[rows, columns, best_BTP].set(True, unique_indices=True)
    return picked_BTS & seen_BTS


class SelectedKeys(NamedTuple):
    """The keys that queries attend to.

    Attributes
    ----------
    slot
        Of the cache.
    seen
        Whether a query may see the key: there can be fewer than are picked.
    distance
        Position of the query less that of the key.
    """

    slot: Int[Array, "B T P"]
    seen: Bool[Array, "B T P"]
    distance: Int[Array, "B T P"]

    def of(self, held: Float[Array, "B S *any"]) -> Float[Array, "B T P *any"]:
        """Return what a cache holds in the slots."""
        rows = jnp.arange(held.shape[0])[:, None, None]
        return held[rows, self.slot]


def select_cached_keys(
    config: TransformerConfig,
    index: IndexerOutput,
    positions: Int[Array, "B T"],
    window: int | None,
) -> SelectedKeys:
    """Return what the newest tokens attend to in a cache that they are already in."""
    slots = index.key.shape[1]
    distance_BTS = positions[:, :, None] - jnp.arange(slots)[None, None]
    worth_BTS = jnp.where(near(distance_BTS, True, window), index_scores(index), -jnp.inf)
    best_BTP, slot = jax.lax.top_k(worth_BTS, min(slots, config.sparse.top_k or slots))
    return SelectedKeys(slot, best_BTP > -jnp.inf, positions[:, :, None] - slot)


def kl_divergence(
    p_BTS: Float32[Array, "B T S"],
    worth_BTS: Float32[Array, "B T S"],
    picked_BTS: Bool[Array, "B T S"],
) -> Float32[Array, ""]:
    """Return the sum over queries of KL(p || softmax of the worth of the keys picked)."""
    # Not -inf: a query without keys would make NaN of it.
    log_q_BTS = jax.nn.log_softmax(jnp.where(picked_BTS, worth_BTS, -1e30), -1)
    some = picked_BTS & (p_BTS > 0)
    log_p_BTS = jnp.log(jnp.where(some, p_BTS, 1))
    return jnp.where(some, p_BTS * (log_p_BTS - log_q_BTS), 0).sum()
