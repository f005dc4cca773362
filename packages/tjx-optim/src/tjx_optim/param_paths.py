"""Parameters by their path: ``blocks/attention/query/bias``.

What a parameter is stands in its path, never in its rank: layers stacked for ``lax.scan`` have
2-D biases [layers, features] and 3-D kernels, so a rule such as "decay what has two axes" decays
biases there.
"""

from collections.abc import Callable
from typing import Any

import jax

# The last part of a path tells the kind of a parameter; these are the names of flax.nnx.
BIAS = "bias"
NORM_SCALE = "scale"
EMBEDDING = "embedding"
CLASS_VECTOR = "cls"
KERNEL = "kernel"

# The module whose kernel gives the outputs.
HEAD = "head"


def path_strings(params: Any) -> Any:
    """Name each leaf by its path.

    Parameters
    ----------
    params : pytree
        Nested dicts (or any pytree) of arrays.

    Returns
    -------
    pytree of str
        The same structure; a leaf is the keys on the way to it joined by ``/``.

    Examples
    --------
    >>> path_strings({"blocks": {"mlp": {"kernel": 0.0}}, "norm": {"scale": 0.0}})
    {'blocks': {'mlp': {'kernel': 'blocks/mlp/kernel'}}, 'norm': {'scale': 'norm/scale'}}
    """
    return map_with_path(lambda path, _: path, params)


def map_with_path(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Map over a tree and others like it, with each leaf's path as a text in front.

    Examples
    --------
    >>> map_with_path(lambda path, a, b: f"{path} {a + b}", {"x": 1}, {"x": 2})
    {'x': 'x 3'}
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(_text(path), *leaves), tree, *rest
    )


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by their paths.

    Examples
    --------
    >>> leaves_by_path({"norm": {"scale": 1.0}})
    {'norm/scale': 1.0}
    """
    return {_text(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def decay_mask(params: Any, *, decay_embeddings: bool = True) -> Any:
    """Tell which parameters weight decay applies to.

    Decayed is everything but biases (last part of the path is ``bias`` or ends in ``_bias``), the
    scales of norms and layers (``scale``, ``*_scale``), and, where asked, embedding tables
    (``embedding``, ``*_embedding``, the class token ``cls``). A number behind such a name, as in
    ``scale_1``, changes nothing.

    Parameters
    ----------
    params : pytree
        Nested dicts of arrays. Only the paths are read.
    decay_embeddings : bool
        Whether embedding tables decay. A table that is tied to the output layer is one of them.

    Returns
    -------
    pytree of bool
        The same structure, True where the parameter decays.

    Examples
    --------
    >>> decay_mask({"mlp": {"kernel": 0.0, "bias": 0.0}, "norm": {"scale": 0.0}})
    {'mlp': {'bias': False, 'kernel': True}, 'norm': {'scale': False}}
    """
    return map_with_path(lambda path, _: decays(path, decay_embeddings=decay_embeddings), params)


def decays(path: str, *, decay_embeddings: bool) -> bool:
    """Tell whether weight decay applies to a parameter; see `decay_mask`."""
    embeddings = () if decay_embeddings else (EMBEDDING, CLASS_VECTOR)
    return not is_kind(path, BIAS, NORM_SCALE, *embeddings)


def is_kind(path: str, *kinds: str) -> bool:
    """Tell whether the last part of a path is one of some kinds, or ends in ``_`` and one.

    Examples
    --------
    >>> is_kind("mlp/bias", "bias"), is_kind("qkv_bias", "bias"), is_kind("unbias", "bias")
    (True, True, False)
    >>> is_kind("blocks/scale_1", "scale")
    True
    """
    name = path.rpartition("/")[2].rstrip("0123456789").removesuffix("_")
    return any(name == kind or name.endswith(f"_{kind}") for kind in kinds)


def is_hidden_matrix(path: str) -> bool:
    """Tell whether a parameter is the matrix of a hidden layer: a kernel, and not a head's.

    Examples
    --------
    >>> is_hidden_kernel("blocks/mlp/up/kernel"), is_hidden_kernel("head/kernel")
    (True, False)
    """
    module = path.rpartition("/")[0]
    return is_kind(path, KERNEL) and not is_kind(module, HEAD)


def _text(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
