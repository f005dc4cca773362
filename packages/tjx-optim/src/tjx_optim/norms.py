"""Norms of gradients, parameters and updates: of all together, and of each layer."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from tjx_optim.param_paths import path_strings


def global_norm(tree: Any) -> jax.Array:
    """Measure the L2 norm over all leaves together, in float32.

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
    return jnp.asarray(optax.tree.norm(jax.tree.map(widened, tree)), jnp.float32)


def layer_norms(tree: Any, stack_axes: Any = None) -> dict[str, jax.Array]:
    """Measure the L2 norm of each parameter of each layer, in float32.

    Parameters
    ----------
    tree : pytree of float arrays
        Gradients, parameters or updates.
    stack_axes : pytree of int like `tree`, optional
        How many leading axes of a leaf stack layers (and experts); None: none of any leaf.

    Returns
    -------
    dict of str to float32 arrays
        A leaf's path to its norms: a scalar, or [layers], or [layers, experts].

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
        return jnp.sqrt(jnp.sum(jnp.square(widened(leaf)), axis=tuple(range(depth, leaf.ndim))))

    paths = jax.tree.leaves(path_strings(tree))
    norms = jax.tree.leaves(jax.tree.map(norm, tree, depths))
    return {path: each.astype(jnp.float32) for path, each in zip(paths, norms, strict=True)}


def widened(array: jax.Array) -> jax.Array:
    """Widen what is narrower than float32: sums of many small terms need the bits."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))
