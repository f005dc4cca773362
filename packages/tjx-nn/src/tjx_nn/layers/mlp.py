"""MLP of a block: two linear layers, or three with a gated activation (SwiGLU, GeGLU).

Axes in names: B batch, T time, D d_model.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tjx_nn.config import TransformerConfig
from tjx_nn.layers.activations import gelu_erf, gelu_tanh, gelu_tanh_of_product
from tjx_nn.layers.linear import linear

# Activation functions by name; "swiglu" and "geglu" give the activation of the gate.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu_tanh": gelu_tanh,
    "gelu_erf": gelu_erf,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "swiglu": jax.nn.silu,
    "geglu": gelu_tanh,
}


class MLP(nnx.Module):
    """Two linear layers with an activation in between.

    Parameters
    ----------
    config
        Configuration of the model: `d_model`, `d_ff`, `activation`, `bias`, `dtype`, `float8`.
    d_ff
        Width of the hidden layer; None is `config.ff_dim`.
    rngs
        Source of random initial values.

    Raises
    ------
    ValueError
        If `config.activation` is gated; `SwiGLU` implements those.

    Examples
    --------
    >>> from tjx_nn import MLP, TransformerConfig
    >>> mlp = MLP(TransformerConfig(d_model=12, activation="relu"), rngs=nnx.Rngs(0))
    >>> mlp(jnp.ones((1, 3, 12))).shape
    (1, 3, 12)
    """

    def __init__(
        self, config: TransformerConfig, *, d_ff: int | None = None, rngs: nnx.Rngs
    ) -> None:
        if config.gated and not isinstance(self, SwiGLU):
            raise ValueError(
                f"config.activation: got {config.activation!r} for MLP; expected an activation "
                "without a gate (gelu_tanh, gelu_erf, relu or relu2); use SwiGLU"
            )
        d, f = config.d_model, d_ff or config.ff_dim
        self.activation = ACTIVATIONS[config.activation]
        if config.activation == "gelu_tanh" and not config.float8:
            self.activation = gelu_tanh_of_product
        self.up = linear(config, ("embed", "mlp"), (d, f), rngs=rngs)
        self.down = linear(config, ("mlp", "embed"), (f, d), residual=True, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply the MLP to the last axis of `x`."""
        y: Array = self.down(self.activation(self.up(x)))
        return y


class SwiGLU(MLP):
    """Gated MLP, SwiGLU or GeGLU: ``down(activation(gate(x)) * up(x))``.

    The activation of the gate is GELU (tanh) if `config.activation` is "geglu", and SiLU for every
    other value. Shazeer 2020, "GLU Variants Improve Transformer". Parameters as for `MLP`.

    Examples
    --------
    >>> from tjx_nn import SwiGLU, TransformerConfig
    >>> mlp = SwiGLU(TransformerConfig(d_model=12, activation="geglu"), d_ff=16, rngs=nnx.Rngs(0))
    >>> mlp(jnp.ones((1, 3, 12))).shape
    (1, 3, 12)
    """

    def __init__(
        self, config: TransformerConfig, *, d_ff: int | None = None, rngs: nnx.Rngs
    ) -> None:
        super().__init__(config, d_ff=d_ff, rngs=rngs)
        if not config.gated:
            self.activation = ACTIVATIONS["swiglu"]
        shape = (config.d_model, d_ff or config.ff_dim)
        self.gate = linear(config, ("embed", "mlp"), shape, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply the MLP to the last axis of `x`."""
        y: Array = self.down(self.activation(self.gate(x)) * self.up(x))
        return y


def make_mlp(config: TransformerConfig, *, d_ff: int | None = None, rngs: nnx.Rngs) -> MLP:
    """Make the MLP of a model: `SwiGLU` for gated activations, otherwise `MLP`."""
    return (SwiGLU if config.gated else MLP)(config, d_ff=d_ff, rngs=rngs)
