"""L2 norms of gradients, parameters and updates: global and per layer."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from tjx_optim.param_paths import path_strings


def global_norm(tree: Any) -> jax.Array:
    """Compute the L2 norm over all leaves together, in float32.

    Parameters
    ----------
    tree : pytree of float arrays
        Gradients, parameters or updates.

    Returns
    -------
    float32 scalar
        ``sqrt(sum of squares)``; narrower leaves are widened before they are squared.

    Examples
    --------
    >>> import jax, numpy as np
    >>> tree = jax.device_put({"a": np.array([3.0]), "b": np.array([[4.0]])})
    >>> float(jax.jit(global_norm)(tree))
    5.0
    """
    return jnp.asarray(optax.tree.norm(jax.tree.map(at_least_float32, tree)), jnp.float32)


def layer_norms(tree: Any, stack_axes: Any = None) -> dict[str, jax.Array]:
    """Compute the L2 norm of each parameter in each layer, in float32.

    Parameters
    ----------
    tree : pytree of float arrays
        Gradients, parameters or updates.
    stack_axes : pytree of int like `tree`, optional
        How many leading axes of a leaf stack layers (and experts); None: 0 for all leaves.

    Returns
    -------
    dict of str to float32 arrays
        Norms by path: a scalar, [layers], or [layers, experts].

    Examples
    --------
    >>> import jax, numpy as np
    >>> tree = jax.device_put({"blocks": {"kernel": np.array([[[3.0, 4.0]], [[0.0, 1.0]]])}})
    >>> norms = jax.jit(lambda tree: layer_norms(tree, {"blocks": {"kernel": 1}}))(tree)
    >>> {path: np.asarray(each).tolist() for path, each in norms.items()}
    {'blocks/kernel': [5.0, 1.0]}
    """
    depths = jax.tree.map(lambda _: 0, tree) if stack_axes is None else stack_axes

    def norm(leaf: jax.Array, depth: int) -> jax.Array:
        axes = tuple(range(depth, leaf.ndim))
        return jnp.sqrt(jnp.sum(jnp.square(at_least_float32(leaf)), axis=axes))

    paths = jax.tree.leaves(path_strings(tree))
    norms = jax.tree.leaves(jax.tree.map(norm, tree, depths))
    return {path: each.astype(jnp.float32) for path, each in zip(paths, norms, strict=True)}


def at_least_float32(array: jax.Array) -> jax.Array:
    """Widen an array that is narrower than float32, for sums of many small terms."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))
