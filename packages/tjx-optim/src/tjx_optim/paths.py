"""Parameters by their path: ``blocks/attention/query/bias``.

What a parameter is stands in its path, never in its rank: layers stacked for ``lax.scan`` have
2-D biases [layers, features] and 3-D kernels, so a rule such as "decay what has two axes" decays
biases there.
"""

from typing import Any

import jax

# The last part of a path tells the kind of a parameter; these are the names of flax.nnx.
BIAS = "bias"
NORM_SCALE = "scale"
EMBEDDING = "embedding"


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
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), params
    )


def decay_mask(params: Any, *, decay_embeddings: bool = True) -> Any:
    """Tell which parameters weight decay applies to.

    Decayed is everything but biases (last part of the path is ``bias`` or ends in ``_bias``), the
    scales of norms (``scale``, ``*_scale``), and, where asked, embedding tables (``embedding``,
    ``*_embedding``).

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
    exempt = (BIAS, NORM_SCALE) if decay_embeddings else (BIAS, NORM_SCALE, EMBEDDING)

    def decays(path: str) -> bool:
        name = path.rsplit("/", 1)[-1]
        return not any(name == kind or name.endswith(f"_{kind}") for kind in exempt)

    return jax.tree.map(decays, path_strings(params))
