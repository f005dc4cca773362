"""Parameter paths such as ``blocks/attention/query/bias``, and the roles that they show.

A role is read from the path and, for names that frameworks use for more than one role, from the
number of axes. It is not read from the number of axes alone: layers stacked for ``lax.scan`` have
2-D biases [layers, features] and 3-D kernels.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

# Names of leaves in flax NNX and Linen, Haiku (w, b, offset, embeddings) and Equinox (weight).
BIASES = ("bias", "offset")
NORM_SCALES = ("scale",)
EMBEDDINGS = ("embedding", "embeddings", "cls")
KERNELS = ("kernel",)
# These name kernels, embedding tables and norm scales alike.
WEIGHTS = ("w", "weight")
HAIKU_BIAS = "b"

# Names of modules.
HEADS = ("head",)
EMBEDDING_MODULES = ("embed", "embedding", "embeddings", "wte", "wpe")


def path_strings(params: Any) -> Any:
    """Replace each leaf of a tree by its path.

    Parameters
    ----------
    params : pytree
        Any pytree: nested dicts, an ``nnx.State``, an Equinox module.

    Returns
    -------
    pytree of str
        The same structure. A path is the keys from the root to the leaf, joined by ``/``; the
        ``value`` of an ``nnx.Variable`` is not part of it.

    Examples
    --------
    >>> path_strings({"blocks": {"mlp": {"kernel": 0.0}}, "norm": {"scale": 0.0}})
    {'blocks': {'mlp': {'kernel': 'blocks/mlp/kernel'}}, 'norm': {'scale': 'norm/scale'}}
    """
    return map_with_path(lambda path, _: path, params)


def map_with_path(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Map a function of (path, leaf, ...) over a tree and others with the same structure.

    Examples
    --------
    >>> map_with_path(lambda path, a, b: f"{path} {a + b}", {"x": 1}, {"x": 2})
    {'x': 'x 3'}
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(_text(path), *leaves), tree, *rest
    )


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Return a dict from path to leaf, in the order of the tree.

    Examples
    --------
    >>> leaves_by_path({"norm": {"scale": 1.0}})
    {'norm/scale': 1.0}
    """
    return {_text(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def decay_mask(params: Any, *, decay_embeddings: bool = True) -> Any:
    """Return which parameters weight decay applies to.

    Decay does not apply to biases (``bias``, ``*_bias``, Haiku's ``b`` and ``offset``), to the
    scales of norms and layers (``scale``, ``*_scale``, and a ``weight`` or ``w`` of one axis), and,
    with ``decay_embeddings=False``, to embedding tables (``embedding``, ``*_embedding``,
    ``embeddings``, ``cls``, and the ``weight`` of a module such as ``embedding`` or ``wte``). A
    trailing number, as in ``scale_1``, is ignored.

    Parameters
    ----------
    params : pytree
        Any pytree of arrays. Paths are read, and the number of axes of ``weight`` and ``w``.
    decay_embeddings : bool
        Whether decay applies to embedding tables. A table tied to the output layer is one.

    Returns
    -------
    pytree of bool
        The same structure.

    Examples
    --------
    >>> decay_mask({"mlp": {"kernel": 0.0, "bias": 0.0}, "norm": {"scale": 0.0}})
    {'mlp': {'bias': False, 'kernel': True}, 'norm': {'scale': False}}
    """
    return map_with_path(
        lambda path, leaf: decays(path, np.ndim(leaf), decay_embeddings=decay_embeddings), params
    )


def decays(path: str, axes: int, *, decay_embeddings: bool) -> bool:
    """Return whether weight decay applies to a parameter; see `decay_mask`.

    Parameters
    ----------
    path : str
        Path of the parameter.
    axes : int
        Number of its axes, without those that stack layers.
    decay_embeddings : bool
        Whether decay applies to embedding tables.

    Examples
    --------
    >>> decays("norm/weight", 1, decay_embeddings=True)
    False
    """
    if is_kind(path, *BIASES, *NORM_SCALES) or _name(path) == HAIKU_BIAS:
        return False
    if _name(path) in WEIGHTS and axes < 2:
        return False
    return decay_embeddings or not _is_embedding(path)


def is_kind(path: str, *kinds: str) -> bool:
    """Return whether the last part of a path is one of some names, or ends in ``_`` and one.

    Examples
    --------
    >>> is_kind("mlp/bias", "bias"), is_kind("qkv_bias", "bias"), is_kind("unbias", "bias")
    (True, True, False)
    >>> is_kind("blocks/scale_1", "scale")
    True
    """
    name = _name(path)
    return any(name == kind or name.endswith(f"_{kind}") for kind in kinds)


def is_hidden_matrix(path: str, axes: int) -> bool:
    """Return whether a parameter is the weight matrix of a hidden layer.

    A ``kernel`` or ``*_kernel``, or a ``weight`` or ``w`` of two axes or more that is no embedding
    table; in neither case of an output layer (``head``, ``*_head``).

    Parameters
    ----------
    path : str
        Path of the parameter.
    axes : int
        Number of its axes, without those that stack layers.

    Examples
    --------
    >>> is_hidden_matrix("blocks/mlp/up/kernel", 2), is_hidden_matrix("head/kernel", 2)
    (True, False)
    >>> is_hidden_matrix("linear/w", 2), is_hidden_matrix("norm/weight", 1)
    (True, False)
    """
    if is_kind(_module(path), *HEADS):
        return False
    return is_kind(path, *KERNELS) or (
        _name(path) in WEIGHTS and axes >= 2 and not _is_embedding(path)
    )


def _is_embedding(path: str) -> bool:
    return is_kind(path, *EMBEDDINGS) or (
        _name(path) in WEIGHTS and is_kind(_module(path), *EMBEDDING_MODULES)
    )


def _name(path: str) -> str:
    return path.rpartition("/")[2].rstrip("0123456789").removesuffix("_")


def _module(path: str) -> str:
    return path.rpartition("/")[0]


def _text(path: Any) -> str:
    # The array of an nnx.Variable is its attribute `value`; in nnx.to_pure_dict it is the leaf.
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")
