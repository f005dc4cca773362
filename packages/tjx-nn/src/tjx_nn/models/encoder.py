"""Bidirectional encoder of BERT, ViT and the encoder-decoder.

Axes in names: B batch, T time, D d_model, N query heads.
"""

from functools import partial
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from tjx_nn.config import TransformerConfig
from tjx_nn.inputs import TokenMetadata
from tjx_nn.layers.block import Block
from tjx_nn.layers.make_layers import make_norm
from tjx_nn.layers.scan_layers import (
    AuxLosses,
    LayerRange,
    layer_stacks,
    run_layers,
)
from tjx_nn.layers.stack_blocks import stack_blocks


class Encoder(nnx.Module):
    """Stack of bidirectional blocks, with a final norm for pre-norm models.

    Parameters
    ----------
    config
        Configuration of the model.
    rngs
        Source of random initial values.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        make = partial(Block, config, causal=False)
        self.dense_blocks, self.blocks = stack_blocks(config, make, rngs)
        self.ln_f = make_norm(config) if config.has_final_norm else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        metadata: TokenMetadata,
        *,
        bias: Float[Array, "#B N T T"] | None = None,
        dropout_keys: Array | None = None,
        drop_tokens: bool = False,
        layers: LayerRange | None = None,
    ) -> tuple[Float[Array, "B T D"], list[AuxLosses]]:
        """Apply the blocks, without the final norm.

        Parameters
        ----------
        x
            Residual stream before the first block.
        metadata
            Positions and segment ids of the tokens.
        bias
            Bias of the scores of all blocks, as for `Attention`.
        dropout_keys
            PRNG key of each block; None disables dropout.
        drop_tokens
            Whether to enforce the capacity of experts.
        layers
            As for `run_layers`.

        Returns
        -------
        x
            Residual stream after the last block.
        aux_losses
            Auxiliary losses of each stack of blocks, arrays [layers].
        """

        def step(x: Array, layer: tuple[Block, Array | None], window: int | None) -> Any:
            block, key = layer
            x, _, aux_losses = block(
                x, *metadata, window=window, bias=bias, dropout_key=key, drop_tokens=drop_tokens
            )
            return x, aux_losses

        stacks = layer_stacks(self.config.stack_windows, self.dense_blocks, self.blocks)
        return run_layers(self.config, step, x, stacks, dropout_keys, layers)

    def final_norm(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Normalize the output of the last block, if the model is pre-norm."""
        return x if self.ln_f is None else self.ln_f(x)
