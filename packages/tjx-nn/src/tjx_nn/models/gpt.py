"""GPT: a decoder-only transformer, by default exactly GPT-2.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; every choice of
`GPTConfig` changes a layer, none of them this file.

Axes in names: B batch, T time, D d_model, V vocabulary.
"""

import math
from typing import Any, Unpack

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from tjx_nn.attention.mha import AuxLosses, KVCache, TokenMetadata
from tjx_nn.inputs import GPTInputs, make_token_metadata, table_positions
from tjx_nn.layers.block import Block
from tjx_nn.layers.embedding import embed, position_table
from tjx_nn.layers.linear import Embedding
from tjx_nn.layers.norms import make_norm
from tjx_nn.layers.scan_layers import (
    LayerRange,
    layer_stacks,
    run_stacks,
    split_layer_keys,
    stacked,
    unstack_layers,
)
from tjx_nn.layout import ShardedModule, gather_sequence
from tjx_nn.losses import Losses, head_logits, head_losses, losses
from tjx_nn.models.gpt_config import GPTConfig
from tjx_nn.tokens import Ids, Positions, check_tokens, default_positions

Cache = list[KVCache]


class GPT(ShardedModule):
    """A decoder-only transformer.

    The parameters of blocks are stacked: each has a leading axis "layers". Where the first blocks
    have an MLP and the others experts, they are two stacks.

    Parameters
    ----------
    config
        Sizes and choices.
    rngs
        Source of the initial values: normal(0, init_std), projections into the residual stream
        normal(0, init_std / sqrt(2 * n_layer)), biases 0, norm scales 1.
    """

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        d, std = config.d_model, config.init_std
        self.wte = Embedding(config.vocab_rows, d, axes=("vocab", "embed"), std=std, rngs=rngs)
        self.wpe = position_table(config, rngs=rngs)
        dense = config.n_dense_layer
        self.dense_blocks = self._make_blocks(dense, False, rngs) if dense else None
        self.blocks = self._make_blocks(config.n_layer - dense, config.experts.count > 0, rngs)
        self.ln_f = make_norm(config) if config.norm_position == "pre" else None
        self.head = (
            None
            if config.tied_head
            else Embedding(config.vocab_rows, d, axes=("vocab", "embed"), std=std, rngs=rngs)
        )

    def _make_blocks(self, count: int, experts: bool, rngs: nnx.Rngs) -> Block:
        return stacked(lambda r: Block(self.config, experts=experts, rngs=r), count, rngs)

    def __call__(
        self,
        tokens: Ids,
        *,
        positions: Positions | None = None,
        segment_ids: Ids | None = None,
        dropout_key: Array | None = None,
    ) -> Float32[Array, "B T V"]:
        """Return the logits of the token after each position.

        Parameters
        ----------
        tokens
            Token ids. Inside `jax.jit` ids outside the vocabulary are clipped to it.
        positions
            Position of each token. None counts from 0, and from 0 again at the start of each
            segment.
        segment_ids
            Document that each token belongs to, where several are packed in a row; tokens see only
            their own document.
        dropout_key
            Key of this step's dropout. None means no dropout: give a key exactly when training.

        Raises
        ------
        ValueError
            If the sequence is longer than `max_seq_len`, or, outside `jax.jit`, if a token is not
            in the vocabulary or a position beyond `max_seq_len`.
        """
        return self.logits(
            self.hidden(
                tokens, positions=positions, segment_ids=segment_ids, dropout_key=dropout_key
            )
        )

    def losses(
        self,
        tokens: Ids,
        labels: Ids,
        *,
        positions: Positions | None = None,
        segment_ids: Ids | None = None,
        dropout_key: Array | None = None,
    ) -> Losses:
        """Return the cross-entropy of each label and the model's other losses.

        All logits are never held at once. Here alone do experts drop what is beyond their capacity:
        logits and what is generated depend on no other token's choice of experts.

        Parameters
        ----------
        tokens, positions, segment_ids, dropout_key
            As for calling the model.
        labels
            Ids of the tokens to predict; where it is -100 the loss is 0.
        """
        inputs: GPTInputs = {
            "positions": positions, "segment_ids": segment_ids, "dropout_key": dropout_key,
        }  # fmt: skip
        # Once for both its uses: over devices it is gathered, and its gradient summed, once.
        rows = self.wte.rows() if self.head is None else None
        x, reported = self.run_blocks(self.begin(tokens, rows, **inputs), tokens, **inputs)
        found = self.finish(x, self.layout.reorder(labels), rows)
        return losses(self.config, self.layout.restore(found), reported)

    def begin(
        self,
        tokens: Ids,
        rows: Float[Array, "V D"] | None = None,
        **inputs: Unpack[GPTInputs],
    ) -> Float[Array, "B T D"]:
        """Return the residual stream before the first block, tokens in the layout's order.

        `begin`, `run_blocks` and `finish` are the parts into which a pipeline takes `losses`. What
        the table of tokens gives, `rows`, may be shared by the first and the last.
        """
        where = self._where(tokens, inputs)
        tokens = self.layout.reorder(jnp.asarray(tokens))
        _, last = split_layer_keys(self.config, inputs.get("dropout_key"))
        return self._embed(tokens, table_positions(inputs, where), last, rows)

    def run_blocks(
        self,
        x: Float[Array, "B T D"],
        tokens: Ids,
        *,
        part: LayerRange | None = None,
        drop: bool = True,
        **inputs: Unpack[GPTInputs],
    ) -> tuple[Float[Array, "B T D"], list[AuxLosses]]:
        """Return the residual stream after the last block, and what each stack of them reports.

        Parameters
        ----------
        x
            What `begin` or the part before returns.
        tokens, **inputs
            As for calling the model.
        part
            Which blocks the model's parameters are of; None is all.
        drop
            Whether experts drop what is beyond their capacity.
        """
        where = self._where(tokens, inputs)
        keys, _ = split_layer_keys(self.config, inputs.get("dropout_key"))

        def step(x: Array, layer: tuple[Block, Array | None], window: int | None) -> Any:
            block, key = layer
            x, _, aux_losses = block(x, where, window=window, dropout_key=key, drop=drop)
            return x, aux_losses

        return run_stacks(self.config, step, x, self._stacks(), keys, part)

    def finish(
        self,
        x: Float[Array, "B T D"],
        labels: Ids,
        rows: Float[Array, "V D"] | None = None,
    ) -> Float32[Array, "B T"]:
        """Return the cross-entropy of each label, for what the last block returns."""
        return head_losses(
            gather_sequence(self.layout, self._normalised(x)) * self._logit_scale,
            self._head_table() if rows is None else rows,
            labels,
            soft_cap=self.config.logit_soft_cap,
            vocab_size=self.config.tokenizer_size or self.config.vocab_size,
            token_shards=self.layout.token_shards,
        )

    def logits(self, x: Float[Array, "*any D"]) -> Float32[Array, "*any V"]:
        """Multiply normalised hidden vectors with the head."""
        return head_logits(
            x * self._logit_scale,
            self._head_table(),
            soft_cap=self.config.logit_soft_cap,
            vocab_size=self.config.vocab_size,
            tokenizer_size=self.config.tokenizer_size,
        )

    def hidden(
        self,
        tokens: Ids,
        *,
        positions: Positions | None = None,
        segment_ids: Ids | None = None,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B T D"]:
        """Return the normalised output of the last block; parameters as for calling the model."""
        inputs: GPTInputs = {
            "positions": positions, "segment_ids": segment_ids, "dropout_key": dropout_key,
        }  # fmt: skip
        x, _ = self.run_blocks(self.begin(tokens, **inputs), tokens, drop=False, **inputs)
        return self.layout.restore(self._normalised(x))

    def unstacked_blocks(self) -> list[Block]:
        """Return the blocks one by one, as `prefill` and `decode` want them."""
        return unstack_layers(self._stacks())

    def prefill(
        self, blocks: list[Block], tokens: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Return what `hidden` returns, and of each block what a cache keeps of the tokens.

        Parameters
        ----------
        blocks
            `unstacked_blocks()`.
        tokens
            The beginning of each row.
        """
        check_tokens(self.config, tokens, None, vocab_size=self.config.vocab_size)
        where = TokenMetadata(default_positions(tokens.shape[1], None))
        x, cache = self._embed(tokens, where.positions, None), []
        for block, window in zip(blocks, self.config.windows, strict=True):
            x, entries, _ = block(x, where, window=window, drop=False)
            cache.append(entries)
        return self._normalised(x), cache

    def decode(
        self,
        blocks: list[Block],
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: Cache,
    ) -> tuple[Float32[Array, "B T V"], Cache]:
        """Advance by one or a few tokens a row; inside `jax.jit`.

        Parameters
        ----------
        blocks
            `unstacked_blocks()`: taken apart once for all tokens.
        tokens, positions
            The new tokens of each row and their positions, which follow each other.
        cache
            What each block's cache holds; slot s is position s.

        Returns
        -------
        tuple
            Logits of the tokens after each of the new ones, and the cache with these in it.
        """
        x = self._embed(tokens, positions, None)
        new_cache = []
        for block, window, entries in zip(blocks, self.config.windows, cache, strict=True):
            x, entries = block.decode(x, entries, TokenMetadata(positions), window=window)
            new_cache.append(entries)
        return self.logits(self._normalised(x)), new_cache

    def _where(self, tokens: Ids, inputs: GPTInputs) -> TokenMetadata:
        where = make_token_metadata(
            self.config, tokens, inputs.get("positions"), None, inputs.get("segment_ids"),
            vocab_size=self.config.vocab_size,
        )  # fmt: skip
        return self.layout.reordered(where)

    def _stacks(self) -> list[tuple[Block, tuple[int | None, ...]]]:
        """Return the stacks of blocks in their order, and the windows of their blocks."""
        return layer_stacks(self.config, self.dense_blocks, self.blocks)

    def _embed(
        self, tokens: Ids, positions: Array | None, key: Array | None, rows: Array | None = None
    ) -> Float[Array, "B T D"]:
        x = self.wte(jnp.asarray(tokens), rows)
        if self.config.positions == "sinusoidal" and self.config.scale_embeddings:
            x = math.sqrt(self.config.d_model) * x
        return embed(self.config, x, positions, self.wpe, dropout_key=key, layout=self.layout)

    def _normalised(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return x if self.ln_f is None else self.ln_f(x)

    def _head_table(self) -> Float[Array, "rows D"]:
        return (self.wte if self.head is None else self.head).rows()

    @property
    def _logit_scale(self) -> float:
        return 1 / self.config.width_multiplier  # muP; 1 without it
