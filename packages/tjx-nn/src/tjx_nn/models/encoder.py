"""The bidirectional stack of blocks that BERT, ViT and the encoder-decoder share.

Axes in names: B batch, T time, D d_model.
"""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from tjx_nn.attention.mha import AuxLosses, TokenMetadata
from tjx_nn.config import TransformerConfig
from tjx_nn.layers.block import Block
from tjx_nn.layers.norms import make_norm
from tjx_nn.layers.scan_layers import LayerRange, layer_stacks, run_stacks, stacked


class Encoder(nnx.Module):
    """Blocks in which tokens see all of their segment, and where they are pre-norm a last norm.

    Parameters
    ----------
    config
        Sizes and choices.
    rngs
        Source of the initial values.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        dense, experts = config.n_dense_layer, config.experts.count > 0
        self.dense_blocks = (
            stacked(lambda r: Block(config, causal=False, rngs=r), dense, rngs) if dense else None
        )
        self.blocks = stacked(
            lambda r: Block(config, causal=False, experts=experts, rngs=r),
            config.n_layer - dense,
            rngs,
        )
        self.ln_f = make_norm(config) if config.norm_position == "pre" else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        where: TokenMetadata,
        *,
        dropout_keys: Array | None = None,
        drop: bool = False,
        part: LayerRange | None = None,
    ) -> tuple[Float[Array, "B T D"], list[AuxLosses]]:
        """Return the output of the last block, and what each stack of layers reports.

        Parameters
        ----------
        x
            The residual stream before the first block.
        where
            Positions and segments.
        dropout_keys
            A key for each layer.
        drop
            Whether experts drop what is beyond their capacity.
        part
            As for `run_stacks`.
        """

        def step(x: Array, layer: tuple[Block, Array | None], window: int | None) -> Any:
            block, key = layer
            x, _, aux_losses = block(x, where, window=window, dropout_key=key, drop=drop)
            return x, aux_losses

        stacks = layer_stacks(self.config, self.dense_blocks, self.blocks)
        return run_stacks(self.config, step, x, stacks, dropout_keys, part)

    def normalised(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Return what is read of the last block's output."""
        return x if self.ln_f is None else self.ln_f(x)
