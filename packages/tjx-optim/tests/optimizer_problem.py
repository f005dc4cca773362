"""Parameters and gradients of a small model, updated with tjx_optim and with NumPy."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from optimizer_reference import Array, Arrays, Textbook, split

from tjx_optim import OptimizerConfig, evaluation_params, make_optimizer

UPDATES = 100

# Layers stacked for a scan, experts inside them, and what is not stacked: a stacked bias has two
# axes and looks like a matrix, an embedding is one and must not be taken for a kernel.
SHAPES: Mapping[str, tuple[int, ...]] = {
    "wte/embedding": (7, 4),
    "blocks/dense/kernel": (3, 4, 6),
    "blocks/dense/bias": (3, 6),
    "blocks/norm/scale": (3, 4),
    "blocks/experts/kernel": (2, 2, 5, 3),
    "blocks/experts/bias": (2, 2, 3),
    "tower/kernel": (6, 4),
    "final_norm/scale": (4,),
    "head/kernel": (4, 7),
}
# Large enough for factored moments; without these stack axes, optax would factor [128, 130].
LARGE = {"large/kernel": (2, 128, 130), "wide/kernel": (129, 128), "many/bias": (128, 130)}
# Square kernels: soap's eigenvectors are unique only if the covariances have full rank.
SQUARE = {
    **SHAPES, "blocks/dense/kernel": (3, 4, 4), "blocks/experts/kernel": (2, 2, 3, 3),
    "tower/kernel": (6, 6),
}  # fmt: skip

STACK_AXES = {
    "blocks/dense/kernel": 1,
    "blocks/dense/bias": 1,
    "blocks/norm/scale": 1,
    "blocks/experts/kernel": 2,
    "blocks/experts/bias": 2,
    "large/kernel": 1,
    "many/bias": 1,
}
DECAYED = ("blocks/dense/kernel", "blocks/experts/kernel", "tower/kernel", "head/kernel",
           "large/kernel", "wide/kernel")  # fmt: skip
MATRICES = ("blocks/dense/kernel", "blocks/experts/kernel", "tower/kernel")


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Make a nested dict of leaves by path."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def flat(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def problem(shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> tuple[Arrays, list[Arrays]]:
    """Return parameters, and gradients whose global norms are below and above 1."""
    rng = np.random.default_rng(3)
    params = {
        path: rng.normal(scale=0.1, size=shape).astype(np.float32) for path, shape in shapes.items()
    }
    entries = sum(leaf.size for leaf in params.values())
    updates = UPDATES if entries < 10_000 else 30  # of large matrices fewer: they take long
    sizes = 10.0 ** rng.uniform(-1.5, 1.5, updates) / np.sqrt(entries)
    gradients = [
        {path: (size * rng.normal(size=shape)).astype("f") for path, shape in shapes.items()}
        for size in sizes
    ]
    return params, gradients


def stack_axes_of(params: Mapping[str, Any]) -> dict[str, int]:
    """Return the stack axes of some parameters by path."""
    return {path: STACK_AXES.get(path, 0) for path in params}


def run(optimizer: Any, params: Arrays, gradients: list[Arrays]) -> tuple[Any, Any, Any]:
    """Apply all updates in one compiled scan.

    Return the parameters and those to evaluate after each, by path, and the last state.
    """

    def update(carry: Any, gradient: Any) -> Any:
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, evaluation_params(state, params))

    @jax.jit
    def all_updates(params: Any, gradients: Any) -> Any:
        carry = (params, optimizer.init(params))
        (_, state), histories = jax.lax.scan(update, carry, gradients)
        return state, *histories

    stacked = {path: np.stack([g[path] for g in gradients]) for path in gradients[0]}
    inputs = jax.device_put((nest(params), nest(stacked)))
    state, trained, evaluated = jax.device_get(all_updates(*inputs))
    return flat(trained), flat(evaluated), state


def worst_difference(got: Mapping[str, Array], want: list[Arrays]) -> float:
    """Return the largest difference of any entry of any parameter after any update."""
    return float(all_differences(got, want).max())


def all_differences(got: Mapping[str, Array], want: list[Arrays]) -> Array:
    """Return the absolute differences of all entries after all updates."""
    assert set(got) == set(want[0])
    return np.concatenate(
        [np.abs(got[path] - np.stack([w[path] for w in want])).ravel() for path in got]
    )


def train(
    config: OptimizerConfig,
    *,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    schedule: Any = None,
    learning_rate_scales: Mapping[str, float] | None = None,
) -> tuple[Any, Any]:
    """Train with tjx_optim; return trained and evaluation parameters after each update."""
    params, gradients = problem(shapes)
    optimizer = make_optimizer(
        config,
        schedule,
        stack_axes=nest(stack_axes_of(params)),
        learning_rate_scales=None if learning_rate_scales is None else nest(learning_rate_scales),
    )
    trained, evaluated, _ = run(optimizer, params, gradients)
    return trained, evaluated


def train_by(
    textbook: Textbook,
    *,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    **of_layers: Mapping[str, Any],
) -> tuple[list[Arrays], list[Arrays]]:
    """Train with NumPy; `of_layers` are fields of the reference's layers, by path."""
    params, gradients = problem(shapes)
    matrices = dict.fromkeys(MATRICES, True)
    layers = split(params, stack_axes_of(params), is_matrix=matrices, **of_layers)
    return textbook.train(layers, gradients)
