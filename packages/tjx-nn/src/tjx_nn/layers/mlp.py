"""The MLP of a block: two linear layers, or three with a gate.

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

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu_tanh": gelu_tanh,
    "gelu_erf": gelu_erf,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "swiglu": jax.nn.silu,
    "geglu": gelu_tanh,
}


class MLP(nnx.Module):
    """Two linear layers with an activation between them.

    Raises
    ------
    ValueError
        If the configuration's activation is gated, which `SwiGLU` is.
    """

    def __init__(
        self, config: TransformerConfig, *, d_ff: int | None = None, rngs: nnx.Rngs
    ) -> None:
        if config.gated and not isinstance(self, SwiGLU):
            raise ValueError(
                f"config.activation: got {config.activation!r} for MLP; expected gelu_tanh, "
                "gelu_erf, relu or relu2, which have no gate; use SwiGLU"
            )
        d, f = config.d_model, d_ff or config.ff_dim
        self.activation = ACTIVATIONS[config.activation]
        if config.activation == "gelu_tanh" and not config.float8:
            self.activation = gelu_tanh_of_product
        self.up = linear(config, ("embed", "mlp"), (d, f), rngs=rngs)
        self.down = linear(config, ("mlp", "embed"), (f, d), residual=True, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Return the transformed `x`."""
        y: Array = self.down(self.activation(self.up(x)))
        return y


class SwiGLU(MLP):
    """An MLP whose hidden layer is multiplied with a gate.

    The gate is SiLU, or GELU where the configuration's activation is "geglu"; activations without a
    gate do not change it. Shazeer 2020, "GLU Variants Improve Transformer".
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
        """Return the transformed `x`."""
        y: Array = self.down(self.activation(self.gate(x)) * self.up(x))
        return y


def make_mlp(config: TransformerConfig, *, d_ff: int | None = None, rngs: nnx.Rngs) -> MLP:
    """Return the MLP that the configuration asks for; `d_ff` is the model's by default."""
    return (SwiGLU if config.gated else MLP)(config, d_ff=d_ff, rngs=rngs)
