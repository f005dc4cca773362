"""Indexer of sparse attention: a light scorer of keys, and the selection of the top-k keys.

Axes in names: B batch, T time of queries, S keys, P selected keys of a query, D d_model,
J indexer heads, I indexer features.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int

from tjx_nn.config import TransformerConfig
from tjx_nn.layers.make_layers import linear, make_norm
from tjx_nn.layers.position_encoding import apply_rope

# Full float32 precision on every platform: the same keys are selected with and without a cache.
EXACT = jax.lax.Precision.HIGHEST


class IndexerOutput(NamedTuple):
    """Indexer projections; the score of key s for query t is sum_j weight * relu(query . key).

    Attributes
    ----------
    query
        Queries of each indexer head.
    weight
        Weight of each indexer head.
    key
        Keys, shared by the heads.
    """

    query: Float[Array, "B T J I"]
    weight: Float[Array, "B T J"]
    key: Float[Array, "B S I"]


class Indexer(nnx.Module):
    """Lightning indexer: scores keys for sparse attention (DeepSeek-AI 2025, "DeepSeek-V3.2").

    The indexer is trained only by its own loss: gradients stop at its input, and the losses of the
    model do not reach its parameters.

    Parameters
    ----------
    config
        Configuration of the model; `config.sparse` configures the indexer.
    rngs
        Source of random initial values.
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
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "#B T"] | None,
        key: Float[Array, "B S I"],
    ) -> IndexerOutput:
        """Project queries of `x` and their head weights, to score `key` (a result of `keys`)."""
        x = jax.lax.stop_gradient(x)
        query = rearrange(self.query(x), "b t (j i) -> b t j i", i=self.config.sparse.head_dim)
        return IndexerOutput(self._apply_rope(query, positions), self.weight(x), key)

    def keys(
        self, x: Float[Array, "B S D"], positions: Int[Array, "#B S"] | None
    ) -> Float[Array, "B S I"]:
        """Project tokens to indexer keys."""
        key = self.key_norm(self.key(jax.lax.stop_gradient(x)))
        return self._apply_rope(key[:, :, None], positions)[:, :, 0]

    def _apply_rope(
        self, x: Float[Array, "B T J I"], positions: Array | None
    ) -> Float[Array, "B T J I"]:
        if self.config.positions != "rope":
            return x
        return apply_rope(x, positions, dataclasses.replace(self.config.rope, dim=None))


def visible_keys(
    distance: Int[Array, "#B T S"], causal: bool, window: int | None, *, symmetric: bool = False
) -> Bool[Array, "#B T S"]:
    """Return the causal and sliding-window mask for distances (query index minus key index)."""
    visible = distance >= 0 if causal else jnp.ones(distance.shape, bool)
    if window is None:
        return visible
    visible = visible & (distance < window)
    return visible & (distance > -window) if symmetric else visible


def index_scores(index: IndexerOutput) -> Float32[Array, "B T S"]:
    """Compute the indexer score of each key for each query."""
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
    config: TransformerConfig,
    scores: Float32[Array, "*rows S"],
    visible: Bool[Array, "*#rows S"],
) -> Bool[Array, "*rows S"]:
    """Return the mask of the up to `top_k` visible keys with the highest scores."""
    visible = jnp.broadcast_to(visible, scores.shape)
    if config.sparse.top_k is None or config.sparse.top_k >= scores.shape[-1]:
        return visible
    scores = jax.lax.stop_gradient(jnp.where(visible, scores, -jnp.inf))
    top = jax.lax.top_k(scores, config.sparse.top_k)[1]
    rows = jnp.ogrid[tuple(slice(size) for size in (*scores.shape[:-1], 1))][:-1]
    # `top_k` returns each key once, so the scatter needs no atomics on GPUs.
    selected = jnp.zeros(scores.shape, bool).at[(*rows, top)].set(True, unique_indices=True)
    return selected & visible


class SelectedKeys(NamedTuple):
    """Keys of a KV cache that each query attends to.

    Attributes
    ----------
    slot
        Slot of the key in the cache.
    visible
        Whether the query may attend to the key; a query can have fewer visible keys than P.
    distance
        Position of the query minus position of the key.
    """

    slot: Int[Array, "B T P"]
    visible: Bool[Array, "B T P"]
    distance: Int[Array, "B T P"]

    def gather(self, entries: Float[Array, "B S *any"]) -> Float[Array, "B T P *any"]:
        """Gather the selected slots of a cache array."""
        rows = jnp.arange(entries.shape[0])[:, None, None]
        return entries[rows, self.slot]


def select_cached_keys(
    config: TransformerConfig,
    index: IndexerOutput,
    positions: Int[Array, "B T"],
    window: int | None,
) -> SelectedKeys:
    """Select the top-k keys of a KV cache that already contains the new tokens."""
    slots = index.key.shape[1]
    distance_BTS = positions[:, :, None] - jnp.arange(slots)[None, None]
    visible_BTS = visible_keys(distance_BTS, True, window)
    scores_BTS = jnp.where(visible_BTS, index_scores(index), -jnp.inf)
    top_BTP, slot = jax.lax.top_k(scores_BTS, min(slots, config.sparse.top_k or slots))
    return SelectedKeys(slot, top_BTP > -jnp.inf, positions[:, :, None] - slot)


def kl_divergence(
    p_BTS: Float32[Array, "B T S"],
    scores_BTS: Float32[Array, "B T S"],
    selected_BTS: Bool[Array, "B T S"],
) -> Float32[Array, ""]:
    """Compute KL(p || softmax of the scores of the selected keys), summed over queries, in nats."""
    # A finite mask value: -inf would give NaN for a query without keys.
    log_q_BTS = jax.nn.log_softmax(jnp.where(selected_BTS, scores_BTS, -1e30), -1)
    support = selected_BTS & (p_BTS > 0)
    log_p_BTS = jnp.log(jnp.where(support, p_BTS, 1))
    return jnp.where(support, p_BTS * (log_p_BTS - log_q_BTS), 0).sum()
