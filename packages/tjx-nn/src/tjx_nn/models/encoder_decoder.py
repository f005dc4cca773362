"""The encoder-decoder: it reads a source, and writes a target token by token.

Vaswani et al. 2017, "Attention Is All You Need"; with `embedding_norm` and learned positions it is
BART (Lewis et al. 2019).

Axes in names: B batch, S tokens of the source, T tokens of the target, D d_model, V vocabulary.
"""

import math
from typing import Unpack

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from tjx_nn.attention.mha import AuxLosses, TokenMetadata
from tjx_nn.inputs import EncoderDecoderInputs, SourceInputs, make_token_metadata
from tjx_nn.layers.block import split
from tjx_nn.layers.embedding import embed, position_table
from tjx_nn.layers.linear import Embedding
from tjx_nn.layers.norms import make_norm
from tjx_nn.layers.scan_layers import split_layer_keys
from tjx_nn.layout import ShardedModule, gather_sequence
from tjx_nn.losses import Losses, head_logits, head_losses, losses
from tjx_nn.models.decoder import BlockCache, Decoder, DecoderBlock, EncoderOutput
from tjx_nn.models.encoder import Encoder
from tjx_nn.models.encoder_decoder_config import EncoderDecoderConfig
from tjx_nn.tokens import Ids, SourceIds, SourceMask, check_tokens, default_positions, padded


class EncoderDecoder(ShardedModule):
    """A bidirectional stack for the source, and a causal one with cross attention for the target.

    Parameters
    ----------
    config
        Sizes and choices.
    rngs
        Source of the initial values, which are those of `GPT`.
    """

    def __init__(self, config: EncoderDecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config

        def table(rows: int) -> Embedding:
            return Embedding(
                rows, config.d_model, axes=("vocab", "embed"), std=config.init_std, rngs=rngs
            )

        self.wte = table(config.vocab_size)
        self.encoder_wte = None if config.source_vocab_size is None else table(config.source_vocab)
        self.encoder_wpe = position_table(config, rngs=rngs)
        self.wpe = position_table(config, rngs=rngs)
        self.encoder_ln_e = make_norm(config) if config.embedding_norm else None
        self.ln_e = make_norm(config) if config.embedding_norm else None
        self.encoder = Encoder(config.encoder, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.head = None if config.tied_head else table(config.vocab_size)
        zeros = jnp.zeros(config.vocab_size, jnp.float32)
        self.head_bias = nnx.Param(zeros, logical_axes=("vocab",)) if config.logit_bias else None

    def __call__(
        self, source: SourceIds, tokens: Ids, **inputs: Unpack[EncoderDecoderInputs]
    ) -> Float32[Array, "B T V"]:
        """Return the logits of the target's token after each position.

        Parameters
        ----------
        source
            Token ids of the source. Inside `jax.jit` ids outside the vocabulary are clipped to it.
        tokens
            Token ids of the target, the start token first.
        **inputs
            See `PairInputs`.

        Raises
        ------
        ValueError
            If a sequence is longer than `max_seq_len`, if one side has segments and the other has
            none, or, outside `jax.jit`, if a token is not in the vocabulary or a position beyond
            `max_seq_len`.
        """
        return self.logits(self.layout.restore(self._read(source, tokens, inputs)[0]))

    def losses(
        self, source: SourceIds, tokens: Ids, labels: Ids, **inputs: Unpack[EncoderDecoderInputs]
    ) -> Losses:
        """Return the cross-entropy of each label and the model's other losses.

        All logits are never held at once.

        Parameters
        ----------
        source, tokens, **inputs
            As for calling the model.
        labels
            The target's tokens to predict; where it is -100 the loss is 0.
        """
        x, reported = self._read(source, tokens, inputs, drop=True)
        table, bias = self._head_table()
        x = gather_sequence(self.layout, x) / self.config.width_multiplier
        labels = self.layout.reorder(labels)
        shards = self.layout.token_shards
        found = head_losses(x, table, labels, bias=bias, token_shards=shards)
        return losses(self.config, self.layout.restore(found), reported)

    def logits(self, x: Float[Array, "B T D"]) -> Float32[Array, "B T V"]:
        """Multiply hidden vectors of the target with the head."""
        table, bias = self._head_table()
        return head_logits(x / self.config.width_multiplier, table, bias=bias)

    def encode(self, source: SourceIds, **inputs: Unpack[SourceInputs]) -> Float[Array, "B S D"]:
        """Return the encoder's output; parameters as for calling the model."""
        memory, _ = self._encode(source, inputs, inputs.get("dropout_key"), drop=False)
        return self.layout.restore(memory.x)

    def unstacked_blocks(self) -> list[DecoderBlock]:
        """Return the decoder's blocks one by one, as `prefill` and `decode` want them."""
        return self.decoder.unstacked_blocks()

    def prefill(
        self,
        blocks: list[DecoderBlock],
        tokens: Int[Array, "B T"],
        memory: Float[Array, "B S D"],
        source_mask: SourceMask | None = None,
    ) -> tuple[Float[Array, "B T D"], list[BlockCache]]:
        """Read the beginning of a target.

        Parameters
        ----------
        blocks
            `unstacked_blocks()`.
        tokens
            Token ids of the target, none or more; positions count from 0.
        memory
            What `encode` returns.
        source_mask
            False or 0 where the source is padding.

        Returns
        -------
        tuple
            What the head reads for each token, and of each block what a cache keeps of the tokens
            and of the source. All its arrays have the batch first.
        """
        check_tokens(self.config, tokens, None, vocab_size=self.config.vocab_size)
        where = TokenMetadata(
            default_positions(tokens.shape[1], None), jnp.zeros(tokens.shape, jnp.int32)
        )
        source_ids = padded(source_mask, jnp.zeros(memory.shape[:2], jnp.int32))
        x, cache = self._embed(tokens, where, None), []
        for block, window in zip(blocks, self.config.windows, strict=True):
            x, entries, _ = block(
                x, where, EncoderOutput(memory, source_ids), window=window, drop=False
            )
            cache.append(entries)
        return self.decoder.normalised(x), cache

    def decode(
        self,
        blocks: list[DecoderBlock],
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: list[BlockCache],
    ) -> tuple[Float32[Array, "B T V"], list[BlockCache]]:
        """Advance by one or a few tokens a row; inside `jax.jit`. As `GPT.decode`."""
        where = TokenMetadata(positions, jnp.zeros(tokens.shape, jnp.int32))
        x = self._embed(tokens, where, None)
        new_cache = []
        for block, window, entries in zip(blocks, self.config.windows, cache, strict=True):
            x, entries = block.decode(x, entries, where, window=window)
            new_cache.append(entries)
        return self.logits(self.decoder.normalised(x)), new_cache

    def _read(
        self, source: SourceIds, tokens: Ids, inputs: EncoderDecoderInputs, *, drop: bool = False
    ) -> tuple[Float[Array, "B T D"], list[AuxLosses]]:
        config, segments = self.config, inputs.get("segment_ids")
        if (segments is None) != (inputs.get("source_segment_ids") is None):
            raise ValueError("segment_ids and source_segment_ids: give both or neither")
        where = make_token_metadata(
            config, tokens, inputs.get("positions"), inputs.get("mask"), segments,
            vocab_size=config.vocab_size,
        )  # fmt: skip
        encoder_key, decoder_key = split(inputs.get("dropout_key"), 2)
        memory, reported = self._encode(source, inputs, encoder_key, drop=drop)
        # Cross attention has segments on both sides or on none; 0 is what a mask alone makes.
        if memory.segment_ids is not None and where.segment_ids is None:
            where = where._replace(segment_ids=jnp.zeros(tokens.shape, jnp.int32))
        if where.segment_ids is not None and memory.segment_ids is None:
            memory = memory._replace(segment_ids=jnp.zeros(source.shape, jnp.int32))
        keys, last = split_layer_keys(config, decoder_key)
        where = self.layout.reordered(where)
        x = self._embed(self.layout.reorder(jnp.asarray(tokens)), where, last)
        x, more = self.decoder(x, where, memory, dropout_keys=keys, drop=drop)
        return x, [*reported, *more]

    def _encode(
        self, source: SourceIds, inputs: SourceInputs, dropout_key: Array | None, *, drop: bool
    ) -> tuple[EncoderOutput, list[AuxLosses]]:
        config = self.config.encoder
        where = make_token_metadata(
            config, source, inputs.get("source_positions"), inputs.get("source_mask"),
            inputs.get("source_segment_ids"), vocab_size=config.source_vocab,
        )  # fmt: skip
        where = self.layout.reordered(where)
        ordered = self.layout.reorder(jnp.asarray(source))
        keys, last = split_layer_keys(config, dropout_key)
        x = embed(
            config,
            self._looked_up(self.wte if self.encoder_wte is None else self.encoder_wte, ordered),
            where.positions,
            self.encoder_wpe,
            norm=self.encoder_ln_e,
            dropout_key=last,
            layout=self.layout,
        )
        x, reported = self.encoder(x, where, dropout_keys=keys, drop=drop)
        return EncoderOutput(self.encoder.normalised(x), where.segment_ids), reported

    def _embed(self, tokens: Ids, where: TokenMetadata, key: Array | None) -> Float[Array, "B T D"]:
        return embed(
            self.config,
            self._looked_up(self.wte, jnp.asarray(tokens)),
            where.positions,
            self.wpe,
            norm=self.ln_e,
            dropout_key=key,
            layout=self.layout,
        )

    def _looked_up(self, table: Embedding, tokens: Int[Array, "B T"]) -> Float32[Array, "B T D"]:
        x = table(tokens)
        return math.sqrt(self.config.d_model) * x if self.config.scale_embeddings else x

    def _head_table(self) -> tuple[Float[Array, "V D"], Float32[Array, " V"] | None]:
        bias = self.head_bias
        table = (self.wte if self.head is None else self.head).rows()
        return table, None if bias is None else bias[...]
