"""Conversion between pytrees and flat dicts from key to leaf.

A checkpoint stores leaves under readable keys ("params/blocks/kernel"), not the Python classes of
their containers, so that reading it needs no unpickling and no imports.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tjx_ckpt.leaf_spec import LeafSpec


def flatten(tree: Any) -> dict[str, Any]:
    """Return a dict from key, such as ``params/blocks/kernel``, to leaf.

    Raises
    ------
    ValueError
        If two leaves have the same key.

    Examples
    --------
    >>> flatten({"params": {"w": 1}, "moments": (2, 3)})
    {'moments/0': 2, 'moments/1': 3, 'params/w': 1}
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        key = jax.tree_util.keystr(path, simple=True, separator="/") or "value"
        if key in leaves:
            raise ValueError(
                f"state: got two leaves with the key {key!r}; expected one; rename one"
            )
        leaves[key] = leaf
    return leaves


def nested_dicts(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return leaves by key as nested dicts; the inverse of `flatten` for a tree of dicts.

    Examples
    --------
    >>> nested_dicts({"params/w": 1, "step": 2})
    {'params': {'w': 1}, 'step': 2}
    """
    tree: dict[str, Any] = {}
    for key, leaf in leaves.items():
        *parents, name = key.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[name] = leaf
    return tree


def describe(leaves: Mapping[str, Any]) -> dict[str, LeafSpec]:
    """Return shape and dtype of each leaf, for arrays and abstract arrays.

    Raises
    ------
    ValueError
        If leaves are not numeric arrays; lists all of them.
    """
    specs: dict[str, LeafSpec] = {}
    problems: list[str] = []
    for key, leaf in leaves.items():
        shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
        if shape is None or dtype is None:
            problems.append(
                f"{key}: got {type(leaf).__name__}; expected an array; use np.asarray(...)"
            )
        elif not (jnp.issubdtype(dtype, np.number) or dtype == np.bool_):
            problems.append(f"{key}: got dtype {dtype}; expected numbers or booleans")
        else:
            specs[key] = LeafSpec(tuple(int(size) for size in shape), np.dtype(dtype).name)
    if problems:
        raise ValueError("\n".join(problems))
    return specs
