"""Checks that parameters fit the settings of an optimizer."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tjx_core import ConfigError, Problem, nearest_names
from tjx_optim.param_groups import ParameterGroup
from tjx_optim.param_masks import path_strings
from tjx_optim.param_rules import ParameterRules, leaves_by_path


def check_params(rules: ParameterRules, params: Any) -> None:
    """Check that parameters fit the trees and groups of their rules.

    Raises
    ------
    ConfigError
        If a parameter is narrower than float32, two have the same path, a tree does not have
        the paths of the parameters, there are more stack axes than axes, or a group is unused.
    """
    leaves = leaves_by_path(params)
    problems = [*_duplicate_paths(params), *_narrow(leaves)]
    for name, given in rules.given.items():
        if given.keys() != leaves.keys():
            odd = sorted(given.keys() ^ leaves.keys())
            problems.append(
                Problem(
                    name,
                    f"got {len(odd)} paths that differ from those of the parameters, such as "
                    f"{odd[0]}; expected a leaf for each parameter; build it from the "
                    "parameters that are trained",
                )
            )
    if not problems:
        problems = [
            Problem(
                "stack_axes",
                f"got {rules.stack_axes(path)} for {path} of shape {tuple(leaf.shape)}; "
                "expected the number of its leading axes that stack layers and experts",
            )
            for path, leaf in leaves.items()
            if not 0 <= rules.stack_axes(path) <= leaf.ndim
        ]
    problems += unused_groups(list(leaves), rules.groups)
    if problems:
        raise ConfigError(problems)


def _duplicate_paths(params: Any) -> list[Problem]:
    counts = Counter(jax.tree.leaves(path_strings(params)))
    return [
        Problem("params", f"got {count} parameters with the path {path}; expected one; rename them")
        for path, count in counts.items()
        if count > 1
    ]


def _narrow(leaves: Mapping[str, Any]) -> list[Problem]:
    narrow = [
        f"{path} ({leaf.dtype})"
        for path, leaf in leaves.items()
        if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
    ]
    if not narrow:
        return []
    return [
        Problem(
            "params",
            f"got {len(narrow)} narrower than float32, such as {narrow[0]}; expected float32; keep "
            "parameters in float32 and cast them inside the model",
        )
    ]


def unused_groups(paths: Sequence[str], groups: Sequence[ParameterGroup]) -> list[Problem]:
    """Return a problem for each group that applies to no parameter.

    Parameters
    ----------
    paths : sequence of str
        The paths of all parameters.
    groups : sequence of ParameterGroup
        In order of precedence.

    Returns
    -------
    list of Problem
        For patterns that match nothing, with the nearest paths, and for patterns whose matches
        all belong to earlier groups.
    """
    problems = []
    for number, group in enumerate(groups):
        matched = [path for path in paths if group.matches(path)]
        if not matched:
            near = nearest_names(group.pattern.replace("*", ""), paths, cutoff=0.0)
            problems.append(
                Problem(
                    "groups",
                    f"got the pattern {group.pattern!r}, which matches no parameter; expected a "
                    f"match; the nearest paths are {', '.join(near)}",
                )
            )
        elif all(any(g.matches(path) for g in groups[:number]) for path in matched):
            problems.append(
                Problem(
                    "groups",
                    f"got the pattern {group.pattern!r}, whose parameters all belong to earlier "
                    "groups; expected some of its own; move it before them or remove it",
                )
            )
    return problems
