"""Scales of the optimizer's values: muP over the width, CompleteP over the depth, rates of blocks.

With `mup_base` the model scales its initial values, attention scores and logits by its width, and
with `mup_base_depth` its sublayers by its depth; the optimizer scales the values of each parameter.

Yang et al. 2022, "Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter
Transfer", table 8; Dey et al. 2025, "Don't be lazy: CompleteP enables compute-efficient deep
transformers", table 1 with alpha = 1. Discriminative rates: Howard and Ruder 2018, "ULMFiT",
section 3.2; Clark et al. 2020, "ELECTRA", appendix B.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from tjx_nn.config import TransformerConfig
from tjx_nn.functional import logical_axes
from tjx_nn.models.gpt_config import GPTConfig

# Logical axes that grow with the width of the model.
_WIDTHS = frozenset({"embed", "heads", "kv_heads", "mlp", "latent"})


def learning_rate_scales(
    config: TransformerConfig, *, layer_decay: float = 1.0, freeze_layers: int = 0
) -> dict[str, Any]:
    """Return the learning-rate multiplier of each parameter, for Adam and similar optimizers.

    With `mup_base` the multiplier of matrices whose two axes grow with the width is base / width,
    and 1 for embeddings, norms and biases; the other arguments multiply it. `mup_base_depth` has no
    effect.

    Parameters
    ----------
    config
        Configuration of the model; a decoder for the other arguments.
    layer_decay
        Factor of each block to the next one: layer_decay for the last block, layer_decay ** 2 for
        the one before, one more for the embeddings, and 1 for the final norm, an untied head and
        the module of `multi_token_loss`.
    freeze_layers
        Number of first blocks with the multiplier 0.

    Returns
    -------
    dict
        Nested as the parameters; a leaf is a float, or a float32 array [layers, 1, ...] that
        broadcasts over the parameters of stacked blocks whose multipliers differ.

    Raises
    ------
    ValueError
        If the model is no decoder and has other multipliers than those of muP, or has fewer blocks
        than are frozen.

    Examples
    --------
    >>> from tjx_nn import GPTConfig
    >>> scales = learning_rate_scales(GPTConfig(d_model=768, mup_base=192))
    >>> scales["blocks"]["mlp"]["up"]["kernel"], scales["wte"]["embedding"]
    (0.25, 1.0)
    >>> scales = learning_rate_scales(GPTConfig(n_layer=3), layer_decay=0.5, freeze_layers=1)
    >>> scales["blocks"]["mlp"]["up"]["kernel"].ravel().tolist(), scales["wte"]["embedding"]
    ([0.0, 0.25, 0.5], 0.0625)
    """
    axes = logical_axes(config)
    scales = _map_axes(
        config, lambda axes: 1 / config.width_multiplier if _is_hidden(axes) else 1.0
    )
    if layer_decay == 1 and not freeze_layers:
        return scales
    if not isinstance(config, GPTConfig) or freeze_layers > config.n_layer:
        raise ValueError(
            f"config: got a {type(config).__name__} of {config.n_layer} blocks; expected a "
            f"GPTConfig of at least {freeze_layers} for layer_decay and freeze_layers"
        )
    of_blocks = layer_decay ** np.arange(config.n_layer, 0, -1, dtype=np.float32)
    of_blocks[:freeze_layers] = 0
    leading = config.n_leading_layer
    factors: dict[str, Any] = {
        "wte": layer_decay ** (config.n_layer + 1),
        "wpe": layer_decay ** (config.n_layer + 1),
        "value_embeddings": layer_decay ** (config.n_layer + 1),
        "dense_blocks": of_blocks[:leading],
        "blocks": of_blocks[leading:],
    }

    def with_factor(name: str, scale: float, axes: tuple[str | None, ...]) -> Any:
        factor = factors.get(name, 1.0)
        if isinstance(factor, np.ndarray):
            factor = factor.reshape(-1, *(1,) * (len(axes) - 1))
        return scale * factor

    return {
        name: jax.tree.map(partial(with_factor, name), tree, axes[name])
        for name, tree in scales.items()
    }


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

    def scale(axes: tuple[str | None, ...]) -> float:
        depth = config.depth_multiplier if "layers" in axes else 1.0
        return 1 / (config.width_multiplier * depth)

    return _map_axes(config, scale)


def _is_hidden(axes: tuple[str | None, ...]) -> bool:
    """Return whether a parameter is a matrix whose two axes grow with the width."""
    return sum(axis in _WIDTHS for axis in axes) > 1


def _map_axes(
    config: TransformerConfig, function: Callable[[tuple[str | None, ...]], float]
) -> dict[str, Any]:
    """Map a function of the logical axes over the parameters."""
    mapped: dict[str, Any] = jax.tree.map(
        function, logical_axes(config), is_leaf=lambda x: isinstance(x, tuple)
    )
    return mapped
