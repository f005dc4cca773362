"""Per-layer application of transformations that reduce over whole arrays.

Layers that are stacked for ``lax.scan`` share an array [layers, ...] (experts: [layers, experts,
...]). A norm, a root mean square or a factored moment of that array would mix layers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tjx_optim.param_masks import path_strings


def per_layer(
    transformation: optax.GradientTransformation, stack_axes: Callable[[str], int]
) -> optax.GradientTransformation:
    """Apply a transformation to each layer of each stacked parameter separately.

    Parameters
    ----------
    transformation : optax.GradientTransformation
        It must treat each array of a tree separately. Integers in its state are step counts.
    stack_axes : callable
        From the path of a parameter to its number of leading axes that stack layers.

    Returns
    -------
    optax.GradientTransformation
        Its state has the structure of the inner one: arrays have the paths of their parameters
        and leading stack axes, counts are shared. Its ``update`` requires the parameters.
    """

    def depths(tree: Any) -> list[int]:
        return [stack_axes(path) for path in jax.tree.leaves(path_strings(tree))]

    def init(params: Any) -> Any:
        structure: Any
        leaves, structure = jax.tree.flatten(params)
        if not leaves:
            return transformation.init(params)
        states = []
        for leaf, depth in zip(leaves, depths(params), strict=True):
            one_layer = jax.eval_shape(lambda x, n=depth: x[(0,) * n], leaf)
            axes = _mapped_axes(jax.eval_shape(transformation.init, one_layer))
            states.append(_over_layers(transformation.init, depth, 0, axes)(leaf))
        return _merge_states(states, structure)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        structure: Any
        leaves, structure = jax.tree.flatten(updates)
        if not leaves:
            return transformation.update(updates, state, params)
        one_state = jax.eval_shape(transformation.init, leaves[0])
        done = []
        for leaf, depth, leaf_state, param in zip(
            leaves,
            depths(updates),
            _split_state(state, one_state, structure),
            structure.flatten_up_to(params),
            strict=True,
        ):
            axes = _mapped_axes(leaf_state)
            one = _over_layers(transformation.update, depth, (0, axes, 0), (0, axes))
            done.append(one(leaf, leaf_state, param))
        new_updates, states = zip(*done, strict=True)
        return structure.unflatten(new_updates), _merge_states(states, structure)

    return optax.GradientTransformation(init, update)


def _over_layers(
    function: Callable[..., Any], depth: int, in_axes: Any, out_axes: Any
) -> Callable[..., Any]:
    for _ in range(depth):
        function = jax.vmap(function, in_axes=in_axes, out_axes=out_axes)
    return function


def _is_count(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.integer))


def _mapped_axes(state: Any) -> Any:
    """Return the ``vmap`` axis of each leaf of a parameter's state: 0, or None for counts."""
    return jax.tree.map(lambda leaf: None if _is_count(leaf) else 0, state)


def _merge_states(states: Sequence[Any], structure: Any) -> Any:
    """Merge the states of all parameters; their counts are equal, so the first is kept."""
    inner: Any = jax.tree.structure(states[0])
    columns = zip(*(inner.flatten_up_to(state) for state in states), strict=True)
    return inner.unflatten(
        [column[0] if _is_count(column[0]) else structure.unflatten(column) for column in columns]
    )


def _split_state(state: Any, one_state: Any, structure: Any) -> list[Any]:
    """Split a merged state into one state, structured like `one_state`, per parameter."""
    inner: Any = jax.tree.structure(one_state)
    size = structure.num_leaves
    columns = [
        [part] * size if _is_count(like) else structure.flatten_up_to(part)
        for like, part in zip(jax.tree.leaves(one_state), inner.flatten_up_to(state), strict=True)
    ]
    return [inner.unflatten([column[n] for column in columns]) for n in range(size)]
