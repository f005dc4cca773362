"""Encoder-decoder transformer for sequence-to-sequence tasks.

Vaswani et al. 2017, "Attention Is All You Need"; with `embedding_norm` and learned positions it is
BART (Lewis et al. 2019), with `relative_buckets` T5 (Raffel et al. 2019).

Axes in names: B batch, S source tokens, T target tokens, D d_model, V vocabulary.
"""

import math
from typing import Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from tjx_nn.attention.kv_cache import slot_positions
from tjx_nn.inputs import Ids, Positions, TokenMetadata
from tjx_nn.layers.block import split_key
from tjx_nn.layers.embedding import (
    Embedding,
    check_tokens,
    default_positions,
    embed,
    make_token_metadata,
    merge_mask,
    position_table,
)
from tjx_nn.layers.make_layers import make_norm
from tjx_nn.layers.relative_bias import RelativeBias
from tjx_nn.layers.scan_layers import AuxLosses, split_layer_keys
from tjx_nn.layout import ShardedModule, gather_sequence, make_param
from tjx_nn.logits import head_logits
from tjx_nn.losses import Losses, combine_losses, head_losses
from tjx_nn.models.decoder import BlockCache, Decoder, DecoderBlock, EncoderOutput
from tjx_nn.models.encoder import Encoder
from tjx_nn.models.encoder_decoder_config import EncoderDecoderConfig
from tjx_nn.models.encoder_inputs import EncoderDecoderInputs, SourceIds, SourceInputs, SourceMask


class EncoderDecoder(ShardedModule):
    """Bidirectional encoder of a source and causal decoder of a target with cross attention.

    Parameters
    ----------
    config
        Configuration of the model.
    rngs
        Source of random initial values, with the distributions of `GPT`.
    """

    def __init__(self, config: EncoderDecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config

        def table(rows: int) -> Embedding:
            return Embedding(rows, config.d_model, std=config.init_std, rngs=rngs)

        self.wte = table(config.vocab_size)
        self.encoder_wte = None if config.source_vocab_size is None else table(config.source_vocab)
        self.encoder_wpe = position_table(config, rngs=rngs)
        self.wpe = position_table(config, rngs=rngs)
        self.encoder_relative_bias = self._make_relative_bias(causal=False, rngs=rngs)
        self.relative_bias = self._make_relative_bias(causal=True, rngs=rngs)
        self.encoder_ln_e = make_norm(config) if config.embedding_norm else None
        self.ln_e = make_norm(config) if config.embedding_norm else None
        self.encoder = Encoder(config.encoder, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.head = None if config.tied_head else table(config.vocab_size)
        zeros = jnp.zeros(config.vocab_size, jnp.float32)
        self.head_bias = make_param(zeros, ("vocab",)) if config.logit_bias else None
        self._head_divisor = config.width_multiplier / config.logit_scale  # muP

    def __call__(
        self, source: SourceIds, tokens: Ids, **inputs: Unpack[EncoderDecoderInputs]
    ) -> Float32[Array, "B T V"]:
        """Compute the logits of the next target token at each position.

        Parameters
        ----------
        source
            Source token ids, [batch, source tokens]. Inside of `jax.jit` out-of-range ids are
            clipped.
        tokens
            Target token ids, [batch, target tokens], beginning with the start token.
        **inputs
            See `EncoderDecoderInputs`.

        Returns
        -------
        Array
            Logits, float32 [batch, target tokens, vocab_size].

        Raises
        ------
        ValueError
            If a sequence exceeds `max_seq_len`, only one side has segment ids, or, outside of
            `jax.jit`, a token id or position is out of range.
        """
        return self.logits(self.layout.restore(self._forward(source, tokens, inputs)[0]))

    def losses(
        self, source: SourceIds, tokens: Ids, labels: Ids, **inputs: Unpack[EncoderDecoderInputs]
    ) -> Losses:
        """Compute the training losses, without materializing all logits.

        Parameters
        ----------
        source, tokens, **inputs
            As for calling the model.
        labels
            Target token ids to predict; the loss of -100 is 0.

        Returns
        -------
        Losses
            Loss of each label in nats, float32 [batch, tokens], and auxiliary losses.
        """
        x, stack_losses = self._forward(source, tokens, inputs, drop_tokens=True)
        table, bias = self._head_table()
        x = gather_sequence(self.layout, x) / self._head_divisor
        labels = self.layout.reorder(labels)
        token_losses, z_loss = head_losses(
            x,
            table,
            labels,
            bias=bias,
            token_shards=self.layout.token_shards,
            keep_logits=self.layout.keep_logits,
            z_loss=self.config.z_loss,
        )
        stack_losses = [*stack_losses, z_loss]
        return combine_losses(self.config, self.layout.restore(token_losses), stack_losses)

    def logits(self, x: Float[Array, "B T D"]) -> Float32[Array, "B T V"]:
        """Compute logits from the hidden states of the target.

        Parameters
        ----------
        x
            Hidden states, [batch, tokens, d_model].

        Returns
        -------
        float32 array [batch, tokens, vocab_size]
            Logits.
        """
        table, bias = self._head_table()
        return head_logits(x / self._head_divisor, table, bias=bias)

    def encode(self, source: SourceIds, **inputs: Unpack[SourceInputs]) -> Float[Array, "B S D"]:
        """Compute the output of the encoder; parameters as for calling the model.

        Parameters
        ----------
        source, **inputs
            As for calling the model.

        Returns
        -------
        array [batch, source tokens, d_model]
            Normalized output of the last block of the encoder.
        """
        encoded, _ = self._encode(source, inputs, inputs.get("dropout_key"), drop_tokens=False)
        return self.layout.restore(encoded.x)

    def unstacked_blocks(self) -> list[DecoderBlock]:
        """Return the blocks of the decoder as a list, for `prefill` and `decode`."""
        return self.decoder.unstacked_blocks()

    def prefill(
        self,
        blocks: list[DecoderBlock],
        tokens: Int[Array, "B T"],
        encoded: Float[Array, "B S D"],
        source_mask: SourceMask | None = None,
    ) -> tuple[Float[Array, "B T D"], list[BlockCache]]:
        """Compute the hidden states and cache entries of the beginning of a target.

        Parameters
        ----------
        blocks
            Result of `unstacked_blocks`.
        tokens
            Target token ids, [batch, tokens]; positions count from 0. May be empty.
        encoded
            Result of `encode`.
        source_mask
            Padding mask of the source: False or 0 for padding.

        Returns
        -------
        hidden
            Input of the output head for each token.
        cache
            Cache entries of each block, of the target and of the source; the batch axis is first.
        """
        check_tokens(self.config, tokens, None, vocab_size=self.config.vocab_size)
        segment_ids = jnp.zeros(tokens.shape, jnp.int32)
        metadata = TokenMetadata(default_positions(tokens.shape[1], None), segment_ids)
        source_ids = merge_mask(source_mask, jnp.zeros(encoded.shape[:2], jnp.int32))
        output = EncoderOutput(encoded, source_ids)
        x, cache = self._embed(tokens, metadata.positions, None), []
        bias = self._score_bias(self.relative_bias, metadata, metadata.positions)
        for block, window in zip(blocks, self.config.windows, strict=True):
            x, entries, _ = block(x, metadata, output, window=window, bias=bias, drop_tokens=False)
            cache.append(entries)
        return self.decoder.final_norm(x), cache

    def decode(
        self,
        blocks: list[DecoderBlock],
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: list[BlockCache],
    ) -> tuple[Float32[Array, "B T V"], list[BlockCache]]:
        """Decode one or a few new target tokens of each row, as `GPT.decode`.

        Parameters
        ----------
        blocks, tokens, positions, cache
            As for `GPT.decode`.

        Returns
        -------
        logits : float32 array [batch, tokens, vocab_size]
            Logits of the new tokens.
        cache : list
            The caches of the blocks, with the new tokens.
        """
        segment_ids = jnp.zeros(tokens.shape, jnp.int32)
        x = self._embed(tokens, positions, None)
        new_cache = []
        for block, window, entries in zip(blocks, self.config.windows, cache, strict=True):
            bias = None
            if self.relative_bias is not None:  # XLA computes equal ones once
                slots = slot_positions(positions[:, -1], entries["self"]["key"].shape[1])
                bias = self.relative_bias(positions, slots)
            x, entries = block.decode(x, entries, positions, segment_ids, window=window, bias=bias)
            new_cache.append(entries)
        return self.logits(self.decoder.final_norm(x)), new_cache

    def _forward(
        self,
        source: SourceIds,
        tokens: Ids,
        inputs: EncoderDecoderInputs,
        *,
        drop_tokens: bool = False,
    ) -> tuple[Float[Array, "B T D"], list[AuxLosses]]:
        config, segments = self.config, inputs.get("segment_ids")
        if (segments is None) != (inputs.get("source_segment_ids") is None):
            raise ValueError(
                "segment_ids, source_segment_ids: got one of them; expected both or neither; give "
                "the segments of both sides"
            )
        metadata = make_token_metadata(
            config, tokens, inputs.get("positions"), inputs.get("mask"), segments,
            vocab_size=config.vocab_size,
        )  # fmt: skip
        encoder_key, decoder_key = split_key(inputs.get("dropout_key"), 2)
        encoded, encoder_losses = self._encode(source, inputs, encoder_key, drop_tokens=drop_tokens)
        # Cross attention needs segments on both sides or neither; a mask alone makes segment 0.
        if encoded.segment_ids is not None and metadata.segment_ids is None:
            metadata = metadata._replace(segment_ids=jnp.zeros(tokens.shape, jnp.int32))
        if metadata.segment_ids is not None and encoded.segment_ids is None:
            encoded = encoded._replace(segment_ids=jnp.zeros(source.shape, jnp.int32))
        keys, embedding_key = split_layer_keys(config, decoder_key)
        metadata = jax.tree.map(self.layout.reorder, metadata)
        ordered = self.layout.reorder(jnp.asarray(tokens))
        x = self._embed(ordered, metadata.positions, embedding_key)
        bias = self._score_bias(self.relative_bias, metadata, inputs.get("positions"))
        x, decoder_losses = self.decoder(
            x, metadata, encoded, bias=bias, dropout_keys=keys, drop_tokens=drop_tokens
        )
        return x, [*encoder_losses, *decoder_losses]

    def _encode(
        self,
        source: SourceIds,
        inputs: SourceInputs,
        dropout_key: Array | None,
        *,
        drop_tokens: bool,
    ) -> tuple[EncoderOutput, list[AuxLosses]]:
        config = self.config.encoder
        metadata = make_token_metadata(
            config, source, inputs.get("source_positions"), inputs.get("source_mask"),
            inputs.get("source_segment_ids"), vocab_size=config.source_vocab,
        )  # fmt: skip
        metadata = jax.tree.map(self.layout.reorder, metadata)
        ordered = self.layout.reorder(jnp.asarray(source))
        keys, embedding_key = split_layer_keys(config, dropout_key)
        x = embed(
            config,
            self._look_up(self.wte if self.encoder_wte is None else self.encoder_wte, ordered),
            metadata.positions,
            self.encoder_wpe,
            norm=self.encoder_ln_e,
            dropout_key=embedding_key,
            layout=self.layout,
        )
        given = inputs.get("source_positions")
        bias = self._score_bias(self.encoder_relative_bias, metadata, given)
        x, aux_losses = self.encoder(
            x, metadata, bias=bias, dropout_keys=keys, drop_tokens=drop_tokens
        )
        return EncoderOutput(self.encoder.final_norm(x), metadata.segment_ids), aux_losses

    def _make_relative_bias(self, *, causal: bool, rngs: nnx.Rngs) -> RelativeBias | None:
        config = self.config
        if config.relative_buckets is None:
            return None
        return RelativeBias(
            config.n_head, config.relative_buckets, config.relative_max_distance,
            causal=causal, std=config.init_std, rngs=rngs,
        )  # fmt: skip

    def _score_bias(
        self, relative_bias: RelativeBias | None, metadata: TokenMetadata, given: Positions | None
    ) -> Float32[Array, "#B N T T"] | None:
        """Return the bias of the scores of self-attention, if the model has one.

        Without `given` positions it is one for all rows, of the order of their tokens: within a
        segment, differences in order equal those of positions.
        """
        if relative_bias is None:
            return None
        positions = metadata.positions
        if given is None:
            positions = self.layout.reorder(jnp.arange(positions.shape[1])[None])
        return relative_bias(positions, positions)

    def _embed(
        self, tokens: Ids, positions: Int[Array, "#B T"], key: Array | None
    ) -> Float[Array, "B T D"]:
        return embed(
            self.config,
            self._look_up(self.wte, jnp.asarray(tokens)),
            positions,
            self.wpe,
            norm=self.ln_e,
            dropout_key=key,
            layout=self.layout,
        )

    def _look_up(self, table: Embedding, tokens: Int[Array, "B T"]) -> Float32[Array, "B T D"]:
        x = table(tokens)
        return math.sqrt(self.config.d_model) * x if self.config.scale_embeddings else x

    def _head_table(self) -> tuple[Float[Array, "V D"], Float32[Array, " V"] | None]:
        bias = self.head_bias
        table = (self.wte if self.head is None else self.head).rows()
        return table, None if bias is None else bias[...]
