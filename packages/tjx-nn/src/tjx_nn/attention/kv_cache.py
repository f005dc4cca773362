"""KV cache of a block: slots, ring buffers of windowed blocks, growth, and attention to a cache.

The cache of a block is a dict of arrays [batch, slots, ...]. The token at position p is in slot
p % slots. Without a window there is a slot for every position; a windowed block has a ring buffer
little larger than its window, where a new token overwrites the oldest.

Axes in names: B batch, T new tokens, S slots, N query heads, K key heads, G query heads that share
a key head, H head_dim.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from tjx_kernels import decode_attention
from tjx_nn.config import TransformerConfig

# Slots of a ring buffer are a multiple of this, for aligned rows.
_RING_MULTIPLE = 16
# Largest cache whose slots are all read at once, filled or not. Larger caches are read in chunks,
# in a loop that ends with the last filled slot. On GPUs each iteration of such a loop synchronizes
# with the host: there all slots are read, and caches grow with their contents.
_MAX_SLOTS_AT_ONCE = {"cpu": 256, "tpu": 1024, "default": None}
# First size of a growing cache on GPUs; each further size doubles it and compiles a new program.
_MIN_GPU_SLOTS = 1024

# Cache entries of a block by name, [batch, slots, ...]: keys and values, or their latents.
KVCache = dict[str, Array]


def cache_slots(config: TransformerConfig, slots: int, new: int = 1) -> tuple[int, ...]:
    """Return the number of cache slots of each block.

    Parameters
    ----------
    config
        Configuration of the model.
    slots
        Slots of a block without a window.
    new
        Largest number of tokens written at once (and possibly reverted): the last of them must not
        overwrite the start of the window of the first.
    """
    # Sparse attention identifies the slot of a key with its position: no ring buffer.
    ring = config.sparse.top_k is None
    return tuple(
        slots
        if window is None or not ring
        else min(slots, -(-(window + new - 1) // _RING_MULTIPLE) * _RING_MULTIPLE)
        for window in config.windows
    )


def slot_positions(newest_B: Int[Array, " B"], slots: int) -> Int[Array, "B S"]:
    """Return the position of the token in each slot; negative for an empty slot."""
    slot_1S = jnp.arange(slots)[None]
    return newest_B[:, None] - (newest_B[:, None] - slot_1S) % slots


def prefill_cache(entries: Any, lengths: Int[Array, " B"], slots: int) -> Any:
    """Make the cache of a block from the entries of a prompt.

    Parameters
    ----------
    entries
        Cache entries of the prompt, [batch, tokens, ...]. Those of an encoder-decoder are nested:
        "self" is converted, and "cross" (of the source) is unchanged.
    lengths
        Number of prompt tokens of each row; later entries are padding. Padding may remain in the
        cache, as decoding overwrites a slot before it reads it.
    slots
        Slots of the cache.
    """
    if "self" in entries:
        return {**entries, "self": prefill_cache(entries["self"], lengths, slots)}

    def fit(entry: Array) -> Array:
        if entry.shape[1] <= slots:
            return _pad_slots(entry, slots)
        index_BS = jnp.maximum(slot_positions(lengths - 1, slots), 0)
        ones = (1,) * (entry.ndim - 2)
        return jnp.take_along_axis(entry, index_BS.reshape(*index_BS.shape, *ones), 1)

    return {name: fit(entry) for name, entry in entries.items()}


def cache_sizes(slots: int, platform: str) -> tuple[int, ...]:
    """Return the successive sizes of a growing cache, in slots.

    Parameters
    ----------
    slots
        Final size.
    platform
        Platform of the device. On GPUs a size is at most twice the previous one; other platforms
        read only filled slots and have a single size.

    Examples
    --------
    >>> cache_sizes(5000, "gpu"), cache_sizes(5000, "cpu"), cache_sizes(1500, "gpu")
    ((1250, 2500, 5000), (5000,), (1500,))
    """
    sizes = [slots]
    while platform not in ("cpu", "tpu") and sizes[0] >= 2 * _MIN_GPU_SLOTS:
        sizes.insert(0, -(-sizes[0] // 2))
    return tuple(sizes)


def grow_cache(config: TransformerConfig, cache: list[Any], slots: int) -> list[Any]:
    """Grow the caches of all blocks to hold `slots` tokens; their entries keep their slots.

    Caches that have their size already are not copied. A ring buffer must grow before it wraps
    around, as its entries would change their slots.
    """

    def resize(entries: Any, size: int) -> Any:
        if "self" in entries:
            return {**entries, "self": resize(entries["self"], size)}
        return {name: _pad_slots(x, size) for name, x in entries.items()}

    sizes = cache_slots(config, slots)
    return [resize(entries, size) for entries, size in zip(cache, sizes, strict=True)]


def _pad_slots(x: Array, slots: int) -> Array:
    if x.shape[1] >= slots:
        return x
    return jnp.pad(x, ((0, 0), (0, slots - x.shape[1])) + ((0, 0),) * (x.ndim - 2))


def select_rows(cache: list[Any], rows: Int[Array, " B"]) -> list[Any]:
    """Gather rows of a cache: row b becomes row `rows[b]`; entries of the source do not move."""

    def select(path: tuple[Any, ...], x: Array) -> Array:
        return x if any(getattr(step, "key", None) == "cross" for step in path) else x[rows]

    selected: list[Any] = jax.tree.map_with_path(select, cache)
    return selected


def update_cache(cache: KVCache, new: KVCache, positions_BT: Int[Array, "B T"]) -> KVCache:
    """Write the entries of new tokens to the slots of their positions."""

    def write(x_S: Array, new_T: Array, positions_T: Array) -> Array:
        return x_S.at[positions_T % x_S.shape[0]].set(new_T.astype(x_S.dtype))

    # By rows: on a mesh that shards them each device writes its own.
    return {name: jax.vmap(write)(x, new[name], positions_BT) for name, x in cache.items()}


def cached_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKV: Float[Array, "B S K V"],
    positions_BT: Int[Array, "B T"],
    *,
    window: int | None,
    scale: float,
    soft_cap: float | None = None,
    alibi_slopes: Float[Array, " N"] | None = None,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N V"]:
    """Compute causal attention of the newest tokens to a KV cache.

    Parameters
    ----------
    q_BTNH
        Queries of the newest tokens.
    k_BSKH, v_BSKV
        Keys and values of the cache, the newest tokens included. Without a window there is a slot
        for every position.
    positions_BT
        Consecutive positions of the newest tokens.
    window, scale, soft_cap, alibi_slopes, sinks
        As for `tjx_kernels.flash_attention`.

    Returns
    -------
    Array
        Output in the dtype of the queries; softmax and sums are float32.
    """
    scores: dict[str, Any] = {
        "scale": scale, "soft_cap": soft_cap, "alibi_slopes": alibi_slopes, "sinks": sinks,
    }  # fmt: skip
    slots = k_BSKH.shape[1]
    if window is not None and window > slots:  # no ring buffer: a slot for every position
        window = None
    all_at_once: Callable[..., Array] = functools.partial(
        _all_at_once, window=window or slots, **scores
    )
    in_chunks: Callable[..., Array] = functools.partial(_in_chunks, **scores)
    operands = (q_BTNH, k_BSKH, v_BSKV, positions_BT)
    by_platform: dict[str, Any] = {
        platform: all_at_once if window is not None or most is None or slots <= most else in_chunks
        for platform, most in _MAX_SLOTS_AT_ONCE.items()
    }
    out: Array = jax.lax.platform_dependent(*operands, **by_platform)
    return out


def _in_chunks(
    q_BTNH: Array, k_BSKH: Array, v_BSKV: Array, positions_BT: Array, **scores: Any
) -> Array:
    out: Array = decode_attention(q_BTNH, k_BSKH, v_BSKV, positions_BT[:, -1] + 1, **scores)
    return out


def _all_at_once(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKV: Array,
    positions_BT: Array,
    *,
    window: int,
    scale: float,
    soft_cap: float | None,
    alibi_slopes: Array | None,
    sinks: Array | None,
) -> Array:
    kv_heads = k_BSKH.shape[2]
    q_BTKGH = rearrange(q_BTNH, "b t (k g) h -> b t k g h", k=kv_heads)
    scores = scale * _scores(q_BTKGH, k_BSKH)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    key_positions_BS = slot_positions(positions_BT[:, -1], k_BSKH.shape[1])
    distance_BTS = positions_BT[:, :, None] - key_positions_BS[:, None]
    if alibi_slopes is not None:
        slopes_1KG11 = rearrange(alibi_slopes, "(k g) -> 1 k g 1 1", k=kv_heads)
        scores -= slopes_1KG11 * distance_BTS[:, None, None].astype(jnp.float32)
    filled_B1S = (key_positions_BS >= 0)[:, None]
    visible_BTS = filled_B1S & (distance_BTS >= 0) & (distance_BTS < window)
    scores = jnp.where(visible_BTS[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, -1)
    if sinks is not None:
        sinks_1KG11 = rearrange(sinks, "(k g) -> 1 k g 1 1", k=kv_heads)
        weights *= jax.nn.sigmoid(jax.nn.logsumexp(scores, -1, keepdims=True) - sinks_1KG11)
    out = _weighted_sum(weights.astype(v_BSKV.dtype), v_BSKV)
    return rearrange(out, "b t k g v -> b t (k g) v").astype(q_BTNH.dtype)


# The product of a single query with the keys of its head is an elementwise product and a sum: as a
# matrix product XLA:CPU would transpose the keys first. The results are float32.
_EXACT: dict[str, Any] = {
    "precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32,
}  # fmt: skip


def _scores(q_BTKGH: Array, k_BSKH: Array) -> Array:
    if q_BTKGH.shape[1] * q_BTKGH.shape[3] > 1:
        return jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, **_EXACT)
    q_B1KH, k = q_BTKGH[:, :, :, 0].astype(jnp.float32), k_BSKH.astype(jnp.float32)
    return (q_B1KH * k).sum(-1).swapaxes(1, 2)[:, :, None, None]


def _weighted_sum(weights_BKGTS: Array, v_BSKV: Array) -> Array:
    if weights_BKGTS.shape[2] * weights_BKGTS.shape[3] > 1:
        return jnp.einsum("bkgts,bskv->btkgv", weights_BKGTS, v_BSKV, **_EXACT)
    weights_BSK = weights_BKGTS[:, :, 0, 0].swapaxes(1, 2).astype(jnp.float32)
    return (weights_BSK[..., None] * v_BSKV.astype(jnp.float32)).sum(1)[:, None, :, None]
