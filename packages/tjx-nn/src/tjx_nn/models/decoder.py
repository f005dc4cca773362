"""The decoder: blocks that attend to the target so far, to the source, and then have the MLP.

Axes in names: B batch, T time, S tokens of the source, D d_model.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tjx_nn.attention.mha import Attention, AuxLosses, KVCache, TokenMetadata
from tjx_nn.layers.block import Block, layer_scale, split
from tjx_nn.layers.norms import make_norm
from tjx_nn.layers.scan_layers import Stack, layer_stacks, run_stacks, stacked, unstack_layers
from tjx_nn.layout import gather_sequence
from tjx_nn.models.encoder_decoder_config import EncoderDecoderConfig

# What a block's cache holds: "self", of the tokens so far, and "cross", keys and values of the
# source ("key", "value") and the segment of each of its tokens ("segment_ids").
BlockCache = dict[str, KVCache]


class EncoderOutput(NamedTuple):
    """What a decoder reads of the source.

    Attributes
    ----------
    x
        The encoder's output.
    segment_ids
        Tokens of the target see only those of the source with their own segment; None is one
        segment for both.
    """

    x: Float[Array, "B S D"]
    segment_ids: Int[Array, "B S"] | None = None


class DecoderBlock(Block):
    """A causal block with cross attention between attention and MLP. Vaswani et al. 2017.

    Cross attention knows no positions: the order of the source is in the memory. It is ordinary
    attention, without a window, also where self attention is latent or sparse.
    """

    def __init__(
        self, config: EncoderDecoderConfig, *, experts: bool = False, rngs: nnx.Rngs
    ) -> None:
        super().__init__(config, experts=experts, rngs=rngs)
        self.ln_cross = make_norm(config)
        self.cross = Attention(config.cross, causal=False, rngs=rngs)
        self.scale_cross = layer_scale(config)

    def __call__(  # type: ignore[override]  # a block of the decoder reads the memory too
        self,
        x: Float[Array, "B T D"],
        where: TokenMetadata,
        memory: EncoderOutput,
        *,
        window: int | None = None,
        dropout_key: Array | None = None,
        drop: bool = True,
    ) -> tuple[Float[Array, "B T D"], BlockCache, AuxLosses]:
        """Return the residual stream after this block, what a cache keeps, and the measures.

        The segments of `where` and `memory` are both given, or neither.
        """
        keys = split(dropout_key, 5)
        h = self.read(x, self.ln_1)
        with jax.named_scope("attention_layer"):  # as profiles name it
            attended, entries, aux_losses = self.attention(
                h, where, window=window, dropout_key=keys[0]
            )
        x = self.add(x, attended, self.ln_1, self.scale_1, keys[1])
        cross = self.cross_entries(memory)
        x = self._cross(x, where, cross, keys[2], keys[3])
        assert self.ln_2 is not None  # the configuration has no parallel block
        fed, more = self.feed(self.read(x, self.ln_2), drop=drop)
        x = self.add(x, fed, self.ln_2, self.scale_2, keys[4])
        return x, {"self": entries, "cross": cross}, aux_losses | more

    def decode(  # type: ignore[override]  # its cache has keys of the source too
        self,
        x: Float[Array, "B T D"],
        cache: BlockCache,
        where: TokenMetadata,
        *,
        window: int | None = None,
    ) -> tuple[Float[Array, "B T D"], BlockCache]:
        """Advance by one or a few tokens a row, with this block's cache."""
        h = self.read(x, self.ln_1)
        attended, entries = self.attention.decode(h, cache["self"], where, window=window)
        x = self.add(x, attended, self.ln_1, self.scale_1)
        x = self._cross(x, where, cache["cross"])
        assert self.ln_2 is not None  # the configuration has no parallel block
        fed, _ = self.feed(self.read(x, self.ln_2), drop=False)
        return self.add(x, fed, self.ln_2, self.scale_2), {**cache, "self": entries}

    def cross_entries(self, memory: EncoderOutput) -> KVCache:
        """Return what cross attention reads of the source: it is the same for all targets."""
        x = gather_sequence(self.layout, memory.x)
        entries = self.cross.keys_values(x, TokenMetadata(jnp.arange(x.shape[1])[None]))
        ids = memory.segment_ids
        return entries if ids is None else {**entries, "segment_ids": ids}

    def _cross(
        self,
        x: Float[Array, "B T D"],
        where: TokenMetadata,
        entries: KVCache,
        weights_key: Array | None = None,
        output_key: Array | None = None,
    ) -> Float[Array, "B T D"]:
        ids = entries.get("segment_ids")
        assert (ids is None) == (where.segment_ids is None)
        attended = self.cross.attend(
            self.read(x, self.ln_cross),
            where,
            entries,
            kv_segment_ids=ids,
            dropout_key=weights_key,
        )
        return self.add(x, attended, self.ln_cross, self.scale_cross, output_key)


class Decoder(nnx.Module):
    """Decoder blocks, and where they are pre-norm a last norm.

    Parameters
    ----------
    config
        Sizes and choices.
    rngs
        Source of the initial values.
    """

    def __init__(self, config: EncoderDecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        dense, experts = config.n_dense_layer, config.experts.count > 0
        self.dense_blocks = (
            stacked(lambda r: DecoderBlock(config, rngs=r), dense, rngs) if dense else None
        )
        self.blocks = stacked(
            lambda r: DecoderBlock(config, experts=experts, rngs=r), config.n_layer - dense, rngs
        )
        self.ln_f = make_norm(config) if config.norm_position == "pre" else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        where: TokenMetadata,
        memory: EncoderOutput,
        *,
        dropout_keys: Array | None = None,
        drop: bool = False,
    ) -> tuple[Float[Array, "B T D"], list[AuxLosses]]:
        """Return the normalised output of the last block, and what each stack reports.

        Parameters
        ----------
        x
            The residual stream before the first block.
        where, memory
            As for a block.
        dropout_keys
            A key for each layer.
        drop
            Whether experts drop what is beyond their capacity.
        """

        def step(x: Array, layer: tuple[DecoderBlock, Array | None], window: int | None) -> Any:
            block, key = layer
            x, _, aux_losses = block(x, where, memory, window=window, dropout_key=key, drop=drop)
            return x, aux_losses

        x, reported = run_stacks(self.config, step, x, self._stacks(), dropout_keys)
        return self.normalised(x), reported

    def normalised(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Return what the head reads of the last block's output."""
        return x if self.ln_f is None else self.ln_f(x)

    def unstacked_blocks(self) -> list[DecoderBlock]:
        """Return the blocks one by one."""
        return unstack_layers(self._stacks())

    def _stacks(self) -> list[Stack]:
        return layer_stacks(self.config, self.dense_blocks, self.blocks)
