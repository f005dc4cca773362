"""L2 norms of gradients, parameters and updates per layer."""

from typing import Any

import jax
import jax.numpy as jnp

from tjx_optim.accumulation import at_least_float32
from tjx_optim.param_masks import path_strings


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
