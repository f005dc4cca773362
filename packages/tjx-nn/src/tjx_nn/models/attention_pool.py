"""Attention pooling of image features.

Axes in names: B batch, T tokens, D d_model.
"""

import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal
from jaxtyping import Array, Float

from tjx_nn.attention.mha import Attention
from tjx_nn.layers.gated_mlp import make_mlp
from tjx_nn.layers.make_layers import make_norm
from tjx_nn.layout import ShardedModule, make_param
from tjx_nn.models.vit_config import ViTConfig


class AttentionPool(ShardedModule):
    """Attention of a trainable probe to all tokens, then an MLP with a residual connection.

    Zhai et al. 2022, "Scaling Vision Transformers" (multihead attention pooling, MAP).

    Parameters
    ----------
    config
        Configuration of the model.
    rngs
        Source of random initial values.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        vector = normal(config.init_std)(rngs.params(), (config.d_model,), jnp.float32)
        self.probe = make_param(vector, ("embed",))
        self.attention = Attention(config.probe, causal=False, rngs=rngs)
        self.norm = make_norm(config)
        self.mlp = make_mlp(config, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        """Pool the tokens of each image.

        Parameters
        ----------
        x
            Normalized features of the tokens.

        Returns
        -------
        array [batch, d_model]
            Features of the image, in the dtype of `x`.
        """
        probe_D = self.gather(self.probe, ("embed",)).astype(x.dtype)
        probe = jnp.broadcast_to(probe_D, (x.shape[0], 1, self.config.d_model))
        cache = self.attention.keys_values(x, None)
        y = self.attention.attend(probe, cache, None, None, None)
        return (y + self.mlp(self.norm(y)))[:, 0]
