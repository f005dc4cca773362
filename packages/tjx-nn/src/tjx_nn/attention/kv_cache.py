"""What blocks keep of the tokens so far, and in which slot of it a token lies.

The cache of a block is a dict of arrays [batch, slots, ...]. The token at position p lies in slot
p % slots. Where there is a slot for every position that is slot p; a block that looks back over a
window keeps little more than the window, and a new token takes the place of the oldest (a ring).

Axes in names: B batch, T new tokens, S slots, N query heads, K key heads, G query heads that share
a key head, H head_dim.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tjx_kernels import decode_attention
from tjx_nn.config import TransformerConfig

# Slots of a ring are a multiple of this, so that rows of its arrays are aligned.
_MULTIPLE = 16
# So many slots are read at once, whether they are filled or not. More are read in a loop over runs
# of them, which ends with the last that is filled. On GPUs the host would wait for the device in
# every turn of such a loop: there all slots are read, and caches grow with what they hold.
_AT_ONCE = {"cpu": 256, "tpu": 1024, "default": None}
# Slots of a GPU's cache at first; it grows by doubling, and each size is a program of its own.
_SMALLEST_GPU_CACHE = 1024

# What a block keeps of each token: keys and values, or what they are made of.
KVCache = dict[str, Array]


def cache_slots(config: TransformerConfig, slots: int, new: int = 1) -> tuple[int, ...]:
    """Return the slots that each block's cache needs.

    Parameters
    ----------
    config
        The model.
    slots
        Slots of a block that looks back over everything.
    new
        Tokens that are written at once: the first of them sees its whole window, and so the last
        must not take the place of what that begins with. As many may be taken back again.
    """
    # Sparse attention picks keys by their positions, which are slots.
    ring = config.sparse.top_k is None
    return tuple(
        slots if window is None or not ring else min(slots, _round_up(window + new - 1))
        for window in config.windows
    )


def slot_positions(newest_B: Int[Array, " B"], slots: int) -> Int[Array, "B S"]:
    """Return the position of the token in each slot; below 0 where there is none yet."""
    slot_1S = jnp.arange(slots)[None]
    return newest_B[:, None] - (newest_B[:, None] - slot_1S) % slots


def prefill_cache(entries: Any, lengths: Int[Array, " B"], slots: int) -> Any:
    """Return a cache that holds the last tokens of each row's prompt.

    Parameters
    ----------
    entries
        What a block keeps of each token, [batch, tokens, ...]; in an encoder-decoder "self", beside
        what it keeps of the source, which stays as it is.
    lengths
        Tokens of each row's prompt; what `entries` holds beyond them is padding. It may stay in the
        cache: decoding looks only at slots up to its own position, and writes each before it looks.
    slots
        Slots of the cache.
    """
    if "self" in entries:
        return {**entries, "self": prefill_cache(entries["self"], lengths, slots)}

    def keep(entry: Array) -> Array:
        tokens = entry.shape[1]
        if tokens <= slots:
            return jnp.pad(entry, ((0, 0), (0, slots - tokens)) + ((0, 0),) * (entry.ndim - 2))
        index_BS = jnp.maximum(slot_positions(lengths - 1, slots), 0)
        return jnp.take_along_axis(entry, index_BS.reshape(*index_BS.shape, *_ones(entry, 2)), 1)

    return {name: keep(entry) for name, entry in entries.items()}


def cache_sizes(slots: int, platform: str) -> tuple[int, ...]:
    """Return the slots that a cache has, one size after the other while it fills.

    Parameters
    ----------
    slots
        Slots of the full cache.
    platform
        Of the device, as JAX names it. A GPU's cache at most doubles; elsewhere there is one size,
        since there only filled slots are read.

    Examples
    --------
    >>> cache_sizes(5000, "gpu"), cache_sizes(5000, "cpu"), cache_sizes(1500, "gpu")
    ((1250, 2500, 5000), (5000,), (1500,))
    """
    sizes = [slots]
    while platform not in ("cpu", "tpu") and sizes[0] >= 2 * _SMALLEST_GPU_CACHE:
        sizes.insert(0, -(-sizes[0] // 2))
    return tuple(sizes)


def grow(config: TransformerConfig, cache: list[Any], slots: int) -> list[Any]:
    """Return a cache with room for `slots` tokens; those that it holds keep their slots.

    Nothing is copied where no block's cache changes its size. A ring must not have been filled past
    its end before it grows: grow before the first token that has no slot of its own.
    """

    def wider(entries: Any, size: int) -> Any:
        if "self" in entries:
            return {**entries, "self": wider(entries["self"], size)}
        return {
            name: jnp.pad(x, ((0, 0), (0, size - x.shape[1])) + ((0, 0),) * (x.ndim - 2))
            if x.shape[1] < size else x
            for name, x in entries.items()
        }  # fmt: skip

    sizes = cache_slots(config, slots)
    return [wider(entries, size) for entries, size in zip(cache, sizes, strict=True)]


def select_rows(cache: list[Any], rows: Int[Array, " B"]) -> list[Any]:
    """Return a cache whose row b is row `rows[b]` of the one given; rows share the source."""

    def select(path: tuple[Any, ...], x: Array) -> Array:
        return x if any(getattr(step, "key", None) == "cross" for step in path) else x[rows]

    selected: list[Any] = jax.tree.map_with_path(select, cache)
    return selected


def write(cache: KVCache, new: KVCache, positions_BT: Int[Array, "B T"]) -> KVCache:
    """Return the cache with new tokens in the slots of their positions."""
    rows_B1 = jnp.arange(len(positions_BT))[:, None]
    return {
        name: held.at[rows_B1, positions_BT % held.shape[1]].set(new[name].astype(held.dtype))
        for name, held in cache.items()
    }


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
) -> Float[Array, "B T N V"]:
    """Attend from the newest tokens to those that a cache holds.

    Parameters
    ----------
    q_BTNH
        Queries of the newest tokens.
    k_BSKH, v_BSKV
        Keys and values, those of the newest tokens among them. Without a window there is a slot for
        every position.
    positions_BT
        Positions of the newest tokens; those of a row follow each other.
    window, scale, soft_cap, alibi_slopes
        As for `tjx_kernels.flash_attention`.

    Returns
    -------
    Array
        In q's dtype; softmax and sums are float32.
    """
    scores: dict[str, Any] = {
        "scale": scale, "soft_cap": soft_cap, "alibi_slopes": alibi_slopes,
    }  # fmt: skip
    slots = k_BSKH.shape[1]
    all_at_once: Callable[..., Array] = functools.partial(
        _all_at_once, window=window or slots, **scores
    )
    by_runs: Callable[..., Array] = functools.partial(_by_runs, **scores)
    operands = (q_BTNH, k_BSKH, v_BSKV, positions_BT)
    chosen: dict[str, Any] = {
        platform: all_at_once if window is not None or most is None or slots <= most else by_runs
        for platform, most in _AT_ONCE.items()
    }
    out: Array = jax.lax.platform_dependent(*operands, **chosen)
    return out


def _by_runs(
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
) -> Array:
    batch, new, heads, dim = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(batch, new, kv_heads, heads // kv_heads, dim)
    scores = scale * _scores(q_BTKGH, k_BSKH)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    where_BS = slot_positions(positions_BT[:, -1], k_BSKH.shape[1])
    back_BTS = positions_BT[:, :, None] - where_BS[:, None]
    if alibi_slopes is not None:
        slopes_KG = alibi_slopes.reshape(1, kv_heads, heads // kv_heads, 1, 1)
        scores -= slopes_KG * back_BTS[:, None, None].astype(jnp.float32)
    seen_BTS = (where_BS >= 0)[:, None] & (back_BTS >= 0) & (back_BTS < window)
    weights = jax.nn.softmax(jnp.where(seen_BTS[:, None, None], scores, -jnp.inf), -1)
    out = _weighted(weights.astype(v_BSKV.dtype), v_BSKV)
    return out.reshape(batch, new, heads, -1).astype(q_BTNH.dtype)


# A product of one vector with the keys of its head is a sum where they lie; as a matrix product it
# would have them transposed first, on CPUs. The results are float32.
_EXACT: dict[str, Any] = {
    "precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32,
}  # fmt: skip


def _scores(q_BTKGH: Array, k_BSKH: Array) -> Array:
    if q_BTKGH.shape[1] * q_BTKGH.shape[3] > 1:
        return jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, **_EXACT)
    q_B1KH, k = q_BTKGH[:, :, :, 0].astype(jnp.float32), k_BSKH.astype(jnp.float32)
    return (q_B1KH * k).sum(-1).swapaxes(1, 2)[:, :, None, None]


def _weighted(weights_BKGTS: Array, v_BSKV: Array) -> Array:
    if weights_BKGTS.shape[2] * weights_BKGTS.shape[3] > 1:
        return jnp.einsum("bkgts,bskv->btkgv", weights_BKGTS, v_BSKV, **_EXACT)
    weights_BSK = weights_BKGTS[:, :, 0, 0].swapaxes(1, 2).astype(jnp.float32)
    return (weights_BSK[..., None] * v_BSKV.astype(jnp.float32)).sum(1)[:, None, :, None]


def _ones(x: Array, axes: int) -> tuple[int, ...]:
    return (1,) * (x.ndim - axes)


def _round_up(size: int) -> int:
    return -(-size // _MULTIPLE) * _MULTIPLE
