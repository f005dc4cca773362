"""Learning-rate multipliers of parameters: muP, and discriminative rates of blocks.

With `mup_base` the model scales its initial values, attention scores and logits by its width; the
optimizer scales the learning rate of each parameter.

Yang et al. 2022, "Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter
Transfer", table 8. Discriminative rates: Howard and Ruder 2018, "ULMFiT", section 3.2; Clark et al.
2020, "ELECTRA", appendix B.
"""

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
    and 1 for embeddings, norms and biases; the other arguments multiply it.

    Parameters
    ----------
    config
        Configuration of the model; a decoder for the other arguments.
    layer_decay
        Factor of each block to the next one: layer_decay for the last block, layer_decay ** 2 for
        the one before, one more for the embeddings, and 1 for the final norm and an untied head.
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

    def scale(axes: tuple[str, ...]) -> float:
        hidden = sum(axis in _WIDTHS for axis in axes) > 1
        return 1 / config.width_multiplier if hidden else 1.0

    axes = logical_axes(config)
    scales: dict[str, Any] = jax.tree.map(scale, axes, is_leaf=lambda x: isinstance(x, tuple))
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
        "dense_blocks": of_blocks[:leading],
        "blocks": of_blocks[leading:],
    }

    def with_factor(name: str, scale: float, axes: tuple[str, ...]) -> Any:
        factor = factors.get(name, 1.0)
        if isinstance(factor, np.ndarray):
            factor = factor.reshape(-1, *(1,) * (len(axes) - 1))
        return scale * factor

    return {
        name: jax.tree.map(partial(with_factor, name), tree, axes[name])
        for name, tree in scales.items()
    }
