"""Per-layer histograms of parameters, counted on the device."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tjx_metrics.trackers.base import Histogram


class DeviceHistogram(NamedTuple):
    """Histograms of one parameter on the device; [...] are its layer and expert axes.

    Attributes
    ----------
    counts : int32 array [..., bins]
        Number of finite values in each bin. Bins have equal width.
    low, high : float32 array [...]
        Smallest and largest finite value: the outer edges of the bins.
    """

    counts: jax.Array
    low: jax.Array
    high: jax.Array


def weight_histograms(
    tree: Any, stack_axes: Any = None, *, bins: int = 64
) -> dict[str, DeviceHistogram]:
    """Compute a histogram of each parameter of each layer, under ``jax.jit``.

    Bins are counted sequentially, each with one reduction over the parameter. This needs no extra
    memory and no all-gather of sharded parameters, and the counts are exact.

    Parameters
    ----------
    tree : pytree of float arrays
        Parameters.
    stack_axes : pytree of int like `tree`, optional
        Number of leading axes of each leaf that stack layers and experts; None: no such axes.
    bins : int
        Number of bins; static.

    Returns
    -------
    dict of str to DeviceHistogram
        Keyed by the path of the leaf, such as ``blocks/mlp/up/kernel``.
    """
    depths = jax.tree.map(lambda _: 0, tree) if stack_axes is None else stack_axes
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): _histogram(leaf, depth, bins)
        for (path, leaf), depth in zip(leaves, jax.tree.leaves(depths), strict=True)
    }


def named_histograms(histograms: Mapping[str, Any], prefix: str) -> dict[str, Histogram]:
    """Convert histograms of stacked layers to one named `Histogram` per layer.

    Parameters
    ----------
    histograms : mapping
        Result of `weight_histograms`, as NumPy arrays.
    prefix : str
        Prefix of the names.

    Returns
    -------
    dict
        Keyed by names such as ``PREFIX/blocks/mlp/up/kernel/3``, with the layer last.

    Examples
    --------
    >>> stacked = DeviceHistogram(np.array([[1, 3]]), np.array([-1.0]), np.array([1.0]))
    >>> for name, histogram in named_histograms({"blocks/kernel": stacked}, "histograms").items():
    ...     print(name, histogram.counts.tolist(), histogram.edges.tolist())
    histograms/blocks/kernel/0 [1, 3] [-1.0, 0.0, 1.0]
    """
    return {
        "/".join([prefix, path, *map(str, index)]): Histogram(
            counts=np.asarray(stacked.counts[index], np.int64),
            edges=np.linspace(float(low), float(stacked.high[index]), stacked.counts.shape[-1] + 1),
        )
        for path, stacked in histograms.items()
        for index, low in np.ndenumerate(stacked.low)
    }


def _histogram(leaf: jax.Array, depth: int, bins: int) -> DeviceHistogram:
    axes = tuple(range(depth, leaf.ndim))
    values = leaf.astype(jnp.float32)
    finite = jnp.isfinite(values)
    low = jnp.min(values, axis=axes, where=finite, initial=jnp.inf, keepdims=True)
    high = jnp.max(values, axis=axes, where=finite, initial=-jnp.inf, keepdims=True)
    any_finite = jnp.isfinite(low)
    low, high = jnp.where(any_finite, low, 0.0), jnp.where(any_finite, high, 0.0)
    width = jnp.where(high > low, high - low, 1.0)
    # The largest value belongs to the last bin.
    bin_index = jnp.clip(jnp.floor((values - low) / width * bins), 0, bins - 1)

    def count(number: jax.Array) -> jax.Array:
        return jnp.sum(finite & (bin_index == number), axis=axes, dtype=jnp.int32)

    counts = jax.lax.map(count, jnp.arange(bins, dtype=jnp.float32))
    shape = leaf.shape[:depth]
    return DeviceHistogram(jnp.moveaxis(counts, 0, -1), low.reshape(shape), high.reshape(shape))
