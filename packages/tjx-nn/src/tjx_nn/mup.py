"""Maximal-update parametrisation: what an optimizer has to know of it.

With `mup_base` the model scales its initial values (linear.py), its attention scores (attention.py)
and its logits (gpt.py) by its width; what is left are the learning rates, which this file gives.

Yang et al. 2022, "Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter
Transfer", table 8.
"""

from typing import Any

import jax

from tjx_nn.config import TransformerConfig
from tjx_nn.functional import logical_axes

# Logical axes that grow with the model's width.
_WIDTHS = frozenset({"embed", "heads", "kv_heads", "mlp", "latent"})


def learning_rate_scales(config: TransformerConfig) -> dict[str, Any]:
    """Return a factor of the learning rate for each parameter, for Adam and what is like it.

    Matrices from width to width learn base / width as fast; tables, norms and biases as fast as
    ever. Without `mup_base` every factor is 1.

    Parameters
    ----------
    config
        The model.

    Returns
    -------
    dict
        Nested as the parameters are; a leaf is a float.

    Examples
    --------
    >>> from tjx_nn import GPTConfig
    >>> scales = learning_rate_scales(GPTConfig(d_model=768, mup_base=192))
    >>> scales["blocks"]["mlp"]["up"]["kernel"], scales["wte"]["embedding"]
    (0.25, 1.0)
    """

    def scale(axes: tuple[str, ...]) -> float:
        hidden = sum(axis in _WIDTHS for axis in axes) > 1
        return 1 / config.width_multiplier if hidden else 1.0

    scales: dict[str, Any] = jax.tree.map(
        scale, logical_axes(config), is_leaf=lambda x: isinstance(x, tuple)
    )
    return scales
