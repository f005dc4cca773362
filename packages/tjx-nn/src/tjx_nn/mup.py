"""Scales of the optimizer's values: muP over the width and CompleteP over the depth.

With `mup_base` the model scales its initial values, attention scores and logits by its width, and
with `mup_base_depth` its sublayers by its depth; the optimizer scales the values of each parameter.

Yang et al. 2022, "Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter
Transfer", table 8; Dey et al. 2025, "Don't be lazy: CompleteP enables compute-efficient deep
transformers", table 1 with alpha = 1.
"""

from collections.abc import Callable
from typing import Any

import jax

from tjx_nn.config import TransformerConfig
from tjx_nn.functional import logical_axes

# Logical axes that grow with the width of the model.
_WIDTHS = frozenset({"embed", "heads", "kv_heads", "mlp", "latent"})


def learning_rate_scales(config: TransformerConfig) -> dict[str, Any]:
    """Return the learning-rate multiplier of each parameter, for Adam and similar optimizers.

    The multiplier of matrices whose two axes grow with the width is base / width, and 1 for
    embeddings, norms and biases. Without `mup_base` every multiplier is 1. The depth has no effect.

    Parameters
    ----------
    config
        Configuration of the model.

    Returns
    -------
    dict
        Nested as the parameters; a leaf is a float.

    Examples
    --------
    >>> from tjx_nn import GPTConfig
    >>> scales = learning_rate_scales(GPTConfig(d_model=768, mup_base=192))
    >>> scales["blocks"]["mlp"]["up"]["kernel"], scales["wte"]["embedding"]
    (0.25, 1.0)
    """
    return _map_axes(config, lambda axes: 1 / config.width_multiplier if _is_hidden(axes) else 1.0)


def weight_decay_scales(config: TransformerConfig) -> dict[str, Any]:
    """Return the multiplier of the weight decay of each parameter, for CompleteP.

    Decoupled decay is multiplied by the learning rate: this multiplier is the inverse of
    `learning_rate_scales`, so that the decay of a step does not depend on the width.

    Parameters
    ----------
    config
        Configuration of the model.

    Returns
    -------
    dict
        Nested as the parameters; a leaf is a float.

    Examples
    --------
    >>> from tjx_nn import GPTConfig
    >>> scales = weight_decay_scales(GPTConfig(d_model=768, mup_base=192, mup_base_depth=2))
    >>> scales["blocks"]["mlp"]["up"]["kernel"], scales["wte"]["embedding"]
    (4.0, 1.0)
    """
    return _map_axes(config, lambda axes: config.width_multiplier if _is_hidden(axes) else 1.0)


def eps_scales(config: TransformerConfig) -> dict[str, Any]:
    """Return the multiplier of Adam's epsilon of each parameter, for CompleteP.

    It is proportional to the gradient, which decreases with the width as base / width, and inside
    of blocks with the depth too.

    Parameters
    ----------
    config
        Configuration of the model.

    Returns
    -------
    dict
        Nested as the parameters; a leaf is a float.

    Examples
    --------
    >>> from tjx_nn import GPTConfig
    >>> config = GPTConfig(n_layer=8, d_model=768, mup_base=192, mup_base_depth=2)
    >>> scales = eps_scales(config)
    >>> scales["blocks"]["mlp"]["up"]["kernel"], scales["wte"]["embedding"]
    (0.0625, 0.25)
    """

    def scale(axes: tuple[str, ...]) -> float:
        depth = config.depth_multiplier if "layers" in axes else 1.0
        return 1 / (config.width_multiplier * depth)

    return _map_axes(config, scale)


def _is_hidden(axes: tuple[str, ...]) -> bool:
    """Return whether a parameter is a matrix whose two axes grow with the width."""
    return sum(axis in _WIDTHS for axis in axes) > 1


def _map_axes(
    config: TransformerConfig, function: Callable[[tuple[str, ...]], float]
) -> dict[str, Any]:
    """Map a function of the logical axes over the parameters."""
    mapped: dict[str, Any] = jax.tree.map(
        function, logical_axes(config), is_leaf=lambda x: isinstance(x, tuple)
    )
    return mapped
