"""Learning rates of muP (maximal update parametrization).

With `mup_base` the model scales its initial values, attention scores and logits by its width; the
optimizer scales the learning rate of each parameter.

Yang et al. 2022, "Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter
Transfer", table 8.
"""

from typing import Any

import jax

from tjx_nn.config import TransformerConfig
from tjx_nn.functional import logical_axes

# Logical axes that grow with the width of the model.
_WIDTHS = frozenset({"embed", "heads", "kv_heads", "mlp", "latent"})


def learning_rate_scales(config: TransformerConfig) -> dict[str, Any]:
    """Return the learning-rate multiplier of each parameter, for Adam and similar optimizers.

    The multiplier of matrices whose two axes grow with the width is base / width, and 1 for
    embeddings, norms and biases. Without `mup_base` every multiplier is 1.

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

    def scale(axes: tuple[str, ...]) -> float:
        hidden = sum(axis in _WIDTHS for axis in axes) > 1
        return 1 / config.width_multiplier if hidden else 1.0

    scales: dict[str, Any] = jax.tree.map(
        scale, logical_axes(config), is_leaf=lambda x: isinstance(x, tuple)
    )
    return scales
