"""Trees of the paths of parameters, and of which of them weight decay applies to."""

from typing import Any

import numpy as np

from tjx_optim.param_rules import decays, map_with_path


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
