"""A transformation for the weight matrices of hidden layers, AdamW's for all other parameters."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from tjx_core import ConfigError, Problem
from tjx_optim.param_rules import ParameterRules, leaves_by_path, map_with_path

# An orthogonal [in, out] has the root mean square 1 / sqrt(max(in, out)); AdamW's updates have 0.2
# to 0.4. With this target one learning rate and decay serve both (Liu et al. 2025, section 2.2).
UPDATE_RMS = 0.2


def partition_matrices(
    name: str,
    rules: ParameterRules,
    of_matrices: optax.GradientTransformation,
    settings: dict[str, float | bool],
) -> optax.GradientTransformation:
    """Transform gradients of matrices [..., in, out]; other parameters take AdamW's direction.

    Parameters
    ----------
    name : str
        Name of the optimizer, for the errors.
    rules : ParameterRules
        Which parameters are matrices (`is_muon_matrix`), and how many of their axes stack layers.
    of_matrices : optax.GradientTransformation
        Transformation of the matrices.
    settings : dict
        ``b1``, ``b2`` and ``eps`` of AdamW.

    Returns
    -------
    optax.GradientTransformation
        Raises ConfigError from ``init`` if a matrix has not exactly two axes beside its stack
        axes, or if no parameter is a matrix, since all would silently take AdamW's direction.
    """

    def label(path: str, leaf: Any) -> str:
        if not rules.is_muon_matrix(path, leaf.ndim):
            return "adamw"
        stacked = rules.stack_axes(path)
        if leaf.ndim - stacked != 2:
            message = (
                f"got {path} of shape {tuple(leaf.shape)} for {name}; expected two axes, [in, "
                f"out], beside the {stacked} that stack layers; pass stack_axes or muon_mask to "
                "make_optimizer, or freeze it"
            )
            raise ConfigError([Problem("params", message)])
        return "matrix"

    def labels(params: Any) -> Any:
        found = map_with_path(label, params)
        by_path = leaves_by_path(found)
        if by_path and "matrix" not in by_path.values():
            message = (
                f"got {name} for {len(by_path)} parameters, such as {min(by_path)}; expected a "
                "weight matrix of a hidden layer among them (`kernel`, `*_kernel`, `weight` or "
                "`w`, not of a `head`); rename one, pass muon_mask to make_optimizer, or use "
                "adamw"
            )
            raise ConfigError([Problem("name", message)])
        return found

    adamw = optax.scale_by_adam(settings["b1"], settings["b2"], settings["eps"])
    return optax.partition({"matrix": of_matrices, "adamw": adamw}, labels)


def map_leaves(function: Callable[..., tuple[Any, ...]], tree: Any, *rest: Any) -> tuple[Any, ...]:
    """Map a function over trees of one structure that returns a new leaf for each argument.

    Returns
    -------
    tuple of pytrees
        One for each tree, also for trees without leaves.

    Examples
    --------
    >>> map_leaves(lambda a, b: (a + b, a - b), {"x": 3}, {"x": 1})
    ({'x': 4}, {'x': 2})
    """
    structure: Any
    leaves, structure = jax.tree.flatten(tree)
    columns = [structure.flatten_up_to(other) for other in rest]
    results = [function(*row) for row in zip(leaves, *columns, strict=True)]
    return tuple(
        structure.unflatten([result[n] for result in results]) for n in range(1 + len(rest))
    )
