"""Gated MLP of a block: SwiGLU and its variants.

Axes in names: B batch, T time, D d_model.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tjx_nn.config import TransformerConfig
from tjx_nn.layers.make_layers import linear, of_sizes
from tjx_nn.layers.mlp import ACTIVATIONS, MLP


def apply_gate(
    config: TransformerConfig, gate: Float[Array, "*any"], up: Float[Array, "*any"]
) -> Float[Array, "*any"]:
    """Compute the hidden layer of a gated MLP: the activation of the gate times the other input.

    Parameters
    ----------
    config
        Configuration of the model; an activation without a gate stands for "swiglu".
    gate, up
        Outputs of the two matrices that read the input of the MLP.
    """
    if config.activation == "clamped_swiglu":
        limit = config.swiglu_limit
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit) + 1
    return ACTIVATIONS[config.activation if config.gated else "swiglu"](gate) * up


class SwiGLU(MLP):
    """Gated MLP, SwiGLU or GeGLU: ``down(activation(gate(x)) * up(x))``.

    The gate has the activation of `config.activation`, and SiLU for a value without a gate.
    "clamped_swiglu" bounds both inputs by `config.swiglu_limit`, adds 1 to ``up(x)``, and its gate
    is the sigmoid approximation of GELU (OpenAI 2025, "gpt-oss-120b & gpt-oss-20b Model Card").
    Shazeer 2020, "GLU Variants Improve Transformer". Parameters as for `MLP`.

    Parameters
    ----------
    config, d_ff, rngs
        As for `MLP`.

    Examples
    --------
    >>> from tjx_nn import SwiGLU, TransformerConfig
    >>> mlp = SwiGLU(TransformerConfig(d_model=12, activation="geglu"), d_ff=16, rngs=nnx.Rngs(0))
    >>> mlp(jnp.ones((1, 3, 12))).shape
    (1, 3, 12)
    """

    def __init__(
        self, config: TransformerConfig | int, *, d_ff: int | None = None, rngs: nnx.Rngs
    ) -> None:
        config = of_sizes(config)
        super().__init__(config, d_ff=d_ff, rngs=rngs)
        self.config = config
        shape = (config.d_model, d_ff or config.ff_dim)
        self.gate = linear(config, ("embed", "mlp"), shape, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply the MLP to the last axis of `x`."""
        y: Array = self.down(apply_gate(self.config, self.gate(x), self.up(x)))
        return y


def make_mlp(config: TransformerConfig, *, d_ff: int | None = None, rngs: nnx.Rngs) -> MLP:
    """Make the MLP of a model: `SwiGLU` for gated activations, otherwise `MLP`."""
    return (SwiGLU if config.gated else MLP)(config, d_ff=d_ff, rngs=rngs)
