"""How the numbers of each layer's parameters are spread, counted on the device."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tjx_metrics.trackers.base import Histogram


class DeviceHistogram(NamedTuple):
    """The histograms of one parameter, on the device; [...] are its layers, and experts.

    Attributes
    ----------
    counts : int32 array [..., bins]
        Finite numbers in each of the bins, which are equally wide.
    low, high : float32 array [...]
        The least and the greatest finite number: where the first bin begins and the last ends.
    """

    counts: jax.Array
    low: jax.Array
    high: jax.Array


def weight_histograms(
    tree: Any, stack_axes: Any = None, *, bins: int = 64
) -> dict[str, DeviceHistogram]:
    """Count the numbers of each parameter of each layer, under ``jax.jit``.

    Bins are counted one after another, each a sum over the parameter: it needs no memory, nothing
    is gathered where the parameter is divided over devices, and the counts are exact.

    Parameters
    ----------
    tree : pytree of float arrays
        Parameters.
    stack_axes : pytree of int like `tree`, optional
        How many leading axes of a leaf stack layers (and experts); None: none of any leaf.
    bins : int
        Number of bins; static.

    Returns
    -------
    dict of str to Spread
        By a leaf's path, such as ``blocks/mlp/up/kernel``.
    """
    depths = jax.tree.map(lambda _: 0, tree) if stack_axes is None else stack_axes
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): _spread(leaf, depth, bins)
        for (path, leaf), depth in zip(leaves, jax.tree.leaves(depths), strict=True)
    }


def named_histograms(spreads: Mapping[str, Any], prefix: str) -> dict[str, Histogram]:
    """Give each histogram of spreads, read from the device, its name and its edges.

    Parameters
    ----------
    spreads : mapping
        From `weight_spreads`, as NumPy arrays.
    prefix : str
        What names begin with.

    Returns
    -------
    dict
        Such as ``PREFIX/blocks/mlp/up/kernel/3``, the layer last.

    Examples
    --------
    >>> spread = Spread(np.array([[1, 3]]), np.array([-1.0]), np.array([1.0]))
    >>> for name, histogram in named_histograms({"blocks/kernel": spread}, "histograms").items():
    ...     print(name, histogram.counts.tolist(), histogram.edges.tolist())
    histograms/blocks/kernel/0 [1, 3] [-1.0, 0.0, 1.0]
    """
    return {
        "/".join([prefix, path, *map(str, index)]): Histogram(
            counts=np.asarray(spread.counts[index], np.int64),
            edges=np.linspace(float(low), float(spread.high[index]), spread.counts.shape[-1] + 1),
        )
        for path, spread in spreads.items()
        for index, low in np.ndenumerate(spread.low)
    }


def _spread(leaf: jax.Array, depth: int, bins: int) -> DeviceHistogram:
    within = tuple(range(depth, leaf.ndim))
    numbers = leaf.astype(jnp.float32)
    finite = jnp.isfinite(numbers)
    low = jnp.min(numbers, axis=within, where=finite, initial=jnp.inf, keepdims=True)
    high = jnp.max(numbers, axis=within, where=finite, initial=-jnp.inf, keepdims=True)
    is_any = jnp.isfinite(low)
    low, high = jnp.where(is_any, low, 0.0), jnp.where(is_any, high, 0.0)
    width = jnp.where(high > low, high - low, 1.0)
    # The greatest number belongs to the last bin.
    place = jnp.clip(jnp.floor((numbers - low) / width * bins), 0, bins - 1)

    def count(number: jax.Array) -> jax.Array:
        return jnp.sum(finite & (place == number), axis=within, dtype=jnp.int32)

    counts = jax.lax.map(count, jnp.arange(bins, dtype=jnp.float32))
    shape = leaf.shape[:depth]
    return DeviceHistogram(jnp.moveaxis(counts, 0, -1), low.reshape(shape), high.reshape(shape))
