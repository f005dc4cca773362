"""Gate of the output of each attention head.

Axes in names: B batch, T time, D d_model, N query heads, H head_dim.
"""

import jax
from flax import nnx
from jaxtyping import Array, Float

from tjx_nn.config import TransformerConfig
from tjx_nn.layers.linear import Linear
from tjx_nn.layout import ShardedModule


class HeadGate(ShardedModule):
    """Gate of each head's output: ``2 * sigmoid(x[:attention_gate] @ kernel)``, 1 at first.

    Qiu et al. 2025, "Gated Attention for Large Language Models", with a gate for each head. As in
    speed runs of GPT-2 it reads a few features and starts as the identity: the kernel is 0.

    Parameters
    ----------
    config
        Configuration of a model with `attention_gate`.
    rngs
        Source of random initial values.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        assert config.attention_gate is not None
        self.features = config.attention_gate
        self.linear = Linear(
            (self.features, config.n_head), axes=(None, "heads"), dtype=config.dtype, std=0.0,
            use_bias=False, rngs=rngs,
        )  # fmt: skip

    def __call__(
        self, x: Float[Array, "B T D"], out: Float[Array, "B T N H"]
    ) -> Float[Array, "B T N H"]:
        """Multiply the output of each head with its gate.

        Parameters
        ----------
        x
            Input of the attention layer.
        out
            Outputs of the heads.

        Returns
        -------
        array [batch, tokens, heads, head_dim]
            The gated outputs.
        """
        gate_BTN = 2 * jax.nn.sigmoid(self.linear(x[..., : self.features]))
        return out * gate_BTN[..., None]


def make_head_gate(config: TransformerConfig, *, rngs: nnx.Rngs) -> HeadGate | None:
    """Make the gate of a model's attention, or None without one."""
    return None if config.attention_gate is None else HeadGate(config, rngs=rngs)
