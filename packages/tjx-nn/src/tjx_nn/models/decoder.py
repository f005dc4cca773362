"""Decoder of the encoder-decoder: causal self-attention, cross attention and an MLP.

Axes in names: B batch, T time, S source tokens (of a cache: its slots), D d_model, N query heads.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from tjx_nn.attention.kv_cache import KVCache
from tjx_nn.attention.mha import Attention
from tjx_nn.inputs import TokenMetadata
from tjx_nn.layers.block import Block, layer_scale, split_key
from tjx_nn.layers.make_layers import make_norm
from tjx_nn.layers.scan_layers import (
    AuxLosses,
    Stack,
    layer_stacks,
    run_layers,
)
from tjx_nn.layers.stack_blocks import stack_blocks, unstack_layers
from tjx_nn.layout import gather_sequence
from tjx_nn.models.encoder_decoder_config import EncoderDecoderConfig

# Cache of a decoder block: "self", entries of the target, and "cross", "key" and "value" of the
# source with the segment of each source token ("segment_ids").
BlockCache = dict[str, KVCache]


class EncoderOutput(NamedTuple):
    """Encoder output that the decoder attends to.

    Attributes
    ----------
    x
        Output of the encoder.
    segment_ids
        Segment of each source token; target tokens attend only to source tokens of their own
        segment. None is a single segment.
    """

    x: Float[Array, "B S D"]
    segment_ids: Int[Array, "B S"] | None = None


class DecoderBlock(Block):
    """Causal block with cross attention between self-attention and MLP (Vaswani et al. 2017).

    Cross attention has no position encoding, as the encoder output contains the order of the
    source. It is multi-head attention without a window even if self-attention is latent or sparse.
    Parameters as for `Block`.
    """

    def __init__(self, config: EncoderDecoderConfig, *, rngs: nnx.Rngs, **options: bool) -> None:
        super().__init__(config, rngs=rngs, **options)
        self.ln_cross = make_norm(config)
        self.cross = Attention(config.cross, causal=False, rngs=rngs)
        self.scale_cross = layer_scale(config)

    def __call__(  # type: ignore[override]  # a decoder block takes the encoder output too
        self,
        x: Float[Array, "B T D"],
        metadata: TokenMetadata,
        encoded: EncoderOutput,
        *,
        window: int | None = None,
        bias: Float[Array, "#B N T T"] | None = None,
        dropout_key: Array | None = None,
        drop_tokens: bool = True,
    ) -> tuple[Float[Array, "B T D"], BlockCache, AuxLosses]:
        """Apply the block to the residual stream of the target.

        Parameters
        ----------
        x
            Residual stream.
        metadata
            Positions and segment ids of the target.
        encoded
            Encoder output. It has segment ids if and only if `metadata` has.
        window, bias, dropout_key, drop_tokens
            As for `Block`; cross attention has no bias.

        Returns
        -------
        x
            Residual stream after the block.
        cache
            Entries of the block's cache.
        aux_losses
            Auxiliary losses of the block.
        """
        keys = split_key(dropout_key, 5)
        h = self._sublayer_input(x, self.ln_1)
        with jax.named_scope("attention_layer"):  # profiles group operations by this scope
            y, entries, aux_losses = self.attention(
                h, *metadata, window=window, bias=bias, dropout_key=keys[0]
            )
        x = self._add(x, y, self.ln_1, self.scale_1, keys[1])
        cross = self.cross_entries(encoded)
        x = self._cross_attend(x, metadata.segment_ids, cross, keys[2], keys[3])
        assert self.ln_2 is not None  # the configuration excludes parallel blocks
        y, mlp_losses = self._mlp(self._sublayer_input(x, self.ln_2), drop_tokens=drop_tokens)
        x = self._add(x, y, self.ln_2, self.scale_2, keys[4])
        return x, {"self": entries, "cross": cross}, aux_losses | mlp_losses

    def decode(  # type: ignore[override]  # the configuration has no shared values
        self,
        x: Float[Array, "B T D"],
        cache: BlockCache,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        window: int | None = None,
        bias: Float[Array, "B N T S"] | None = None,
    ) -> tuple[Float[Array, "B T D"], BlockCache]:
        """Apply the block to new tokens with its cache; parameters as for `Attention.decode`."""
        h = self._sublayer_input(x, self.ln_1)
        y, entries = self.attention.decode(h, cache["self"], positions, window=window, bias=bias)
        x = self._add(x, y, self.ln_1, self.scale_1)
        x = self._cross_attend(x, segment_ids, cache["cross"])
        assert self.ln_2 is not None  # the configuration excludes parallel blocks
        y, _ = self._mlp(self._sublayer_input(x, self.ln_2), drop_tokens=False)
        return self._add(x, y, self.ln_2, self.scale_2), {**cache, "self": entries}

    def cross_entries(self, encoded: EncoderOutput) -> KVCache:
        """Compute the keys and values of cross attention, which all target tokens share."""
        entries = self.cross.keys_values(gather_sequence(self.layout, encoded.x), None)
        ids = encoded.segment_ids
        return entries if ids is None else {**entries, "segment_ids": ids}

    def _cross_attend(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None,
        entries: KVCache,
        weights_key: Array | None = None,
        output_key: Array | None = None,
    ) -> Float[Array, "B T D"]:
        source_ids = entries.get("segment_ids")
        assert (source_ids is None) == (segment_ids is None)
        y = self.cross.attend(
            self._sublayer_input(x, self.ln_cross),
            entries,
            None,
            segment_ids,
            source_ids,
            dropout_key=weights_key,
        )
        return self._add(x, y, self.ln_cross, self.scale_cross, output_key)


class Decoder(nnx.Module):
    """Stack of decoder blocks, with a final norm for pre-norm models.

    Parameters
    ----------
    config
        Configuration of the model.
    rngs
        Source of random initial values.
    """

    def __init__(self, config: EncoderDecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        make = partial(DecoderBlock, config)
        self.dense_blocks, self.blocks = stack_blocks(config, make, rngs)
        self.ln_f = make_norm(config) if config.has_final_norm else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        metadata: TokenMetadata,
        encoded: EncoderOutput,
        *,
        bias: Float[Array, "#B N T T"] | None = None,
        dropout_keys: Array | None = None,
        drop_tokens: bool = False,
    ) -> tuple[Float[Array, "B T D"], list[AuxLosses]]:
        """Apply the blocks and the final norm.

        Parameters
        ----------
        x
            Residual stream before the first block.
        metadata, encoded, bias
            As for `DecoderBlock`.
        dropout_keys
            PRNG key of each block; None disables dropout.
        drop_tokens
            Whether to enforce the capacity of experts.

        Returns
        -------
        x
            Input of the output head.
        aux_losses
            Auxiliary losses of each stack of blocks, arrays [layers].
        """

        def step(x: Array, layer: tuple[DecoderBlock, Array | None], window: int | None) -> Any:
            block, key = layer
            x, _, aux_losses = block(
                x, metadata, encoded,
                window=window, bias=bias, dropout_key=key, drop_tokens=drop_tokens,
            )  # fmt: skip
            return x, aux_losses

        x, aux_losses = run_layers(self.config, step, x, self._stacks(), dropout_keys)
        return self.final_norm(x), aux_losses

    def final_norm(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Normalize the output of the last block, if the model is pre-norm."""
        return x if self.ln_f is None else self.ln_f(x)

    def unstacked_blocks(self) -> list[DecoderBlock]:
        """Return the blocks as a list."""
        return unstack_layers(self._stacks())

    def _stacks(self) -> list[Stack]:
        return layer_stacks(self.config.stack_windows, self.dense_blocks, self.blocks)
