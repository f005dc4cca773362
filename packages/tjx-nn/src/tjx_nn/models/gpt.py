"""GPT: decoder-only transformer. The default configuration is GPT-2.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; options of `GPTConfig`
select its layers (Llama, Mistral, Qwen3, DeepSeek).

Axes in names: B batch, T time, D d_model, V vocabulary, K key heads, H head_dim.
"""

import math
from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from tjx_nn.attention.kv_cache import KVCache
from tjx_nn.inputs import GPTInputs, Ids, Positions, TokenMetadata
from tjx_nn.layers.block import Block
from tjx_nn.layers.embedding import (
    Embedding,
    check_tokens,
    default_positions,
    embed,
    lookup_positions,
    make_token_metadata,
    position_table,
)
from tjx_nn.layers.make_layers import make_norm
from tjx_nn.layers.scan_layers import (
    AuxLosses,
    LayerRange,
    Stack,
    layer_stacks,
    run_layers,
    split_layer_keys,
)
from tjx_nn.layers.stack_blocks import stack_blocks, unstack_layers
from tjx_nn.layout import ShardedModule, gather_sequence
from tjx_nn.logits import head_logits
from tjx_nn.losses import Losses, combine_losses, head_losses
from tjx_nn.models.gpt_config import GPTConfig
from tjx_nn.models.multi_token import MultiToken, multi_token_losses
from tjx_nn.models.shared_values import shared_values, value_table


class GPT(ShardedModule):
    """Decoder-only transformer.

    The parameters of the blocks are stacked along a leading axis "layers". First blocks with other
    layers, such as an MLP before blocks with experts, form a stack of their own.

    Parameters
    ----------
    config
        Configuration of the model.
    rngs
        Source of random initial values: normal(0, init_std); projections to the residual stream
        normal(0, init_std / sqrt(2 * n_layer)); biases 0; norm scales 1.

    Examples
    --------
    >>> from tjx_nn import GPT, GPTConfig
    >>> config = GPTConfig(vocab_size=11, max_seq_len=8, n_layer=2, n_head=2, d_model=4)
    >>> GPT(config, rngs=nnx.Rngs(0))(jnp.array([[1, 2, 3]])).shape
    (1, 3, 11)
    """

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs) -> None:
        self.config, self.stack_windows = config, config.stack_windows
        self.logit_scale = config.logit_scale / config.width_multiplier  # muP
        d, std = config.d_model, config.init_std
        self.wte = Embedding(config.vocab_rows, d, std=std, rngs=rngs)
        self.wpe = position_table(config, rngs=rngs)
        mixes = config.value_mix != "none"
        make = partial(Block, config, embedding_skip=config.embedding_skip, value_mix=mixes)
        self.dense_blocks, self.blocks = stack_blocks(config, make, rngs)
        self.ln_f = make_norm(config) if config.has_final_norm else None
        self.head = (
            None if config.tied_head else Embedding(config.vocab_rows, d, std=std, rngs=rngs)
        )
        self.value_embeddings = value_table(config, rngs=rngs)
        self.multi_token = MultiToken(config, rngs=rngs) if config.multi_token_loss else None

    def __call__(
        self,
        tokens: Ids,
        *,
        positions: Positions | None = None,
        segment_ids: Ids | None = None,
        dropout_key: Array | None = None,
    ) -> Float32[Array, "B T V"]:
        """Compute the logits of the next token at each position.

        Parameters
        ----------
        tokens
            Token ids, [batch, tokens]. Inside of `jax.jit` out-of-range ids are clipped.
        positions
            Position of each token. None counts from 0, restarting at every segment.
        segment_ids
            Document of each token in a packed row; tokens attend only within their document.
        dropout_key
            PRNG key of this step's dropout; None disables dropout (evaluation).

        Returns
        -------
        Array
            Logits, float32 [batch, tokens, vocab_size].

        Raises
        ------
        ValueError
            If the sequence exceeds `max_seq_len`, or, outside of `jax.jit`, a token id or position
            is out of range.
        """
        hidden = self.hidden(
            tokens, positions=positions, segment_ids=segment_ids, dropout_key=dropout_key
        )
        return self.logits(hidden)

    def losses(self, tokens: Ids, labels: Ids, **inputs: Unpack[GPTInputs]) -> Losses:
        """Compute the training losses, without materializing all logits.

        Only this method enforces the capacity of experts: logits and generated text do not depend
        on the routing of other tokens.

        Parameters
        ----------
        tokens, **inputs
            As for calling the model.
        labels
            Token ids to predict, [batch, tokens]; the loss of -100 is 0.

        Returns
        -------
        Losses
            Loss of each label in nats, float32 [batch, tokens], and auxiliary losses.
        """
        # Gather the tied table once: its gradient is also reduced once.
        rows = self.wte.rows() if self.head is None else None
        x = self.embed_tokens(tokens, rows, **inputs)
        x, aux_losses = self.run_blocks(x, tokens, **inputs)
        if self.multi_token is not None:
            aux_losses += multi_token_losses(self, x, tokens, labels, rows, **inputs)
        losses, z_loss = self.token_losses(x, self.layout.reorder(labels), rows)
        return combine_losses(self.config, self.layout.restore(losses), [*aux_losses, z_loss])

    def embed_tokens(
        self,
        tokens: Ids,
        rows: Float[Array, "V D"] | None = None,
        **inputs: Unpack[GPTInputs],
    ) -> Float[Array, "B T D"]:
        """Compute the residual stream before the first block, tokens in device order.

        A pipeline splits `losses` into `embed_tokens`, `run_blocks` and `token_losses`. `rows` is
        the gathered token table, to share it between the first and the last.

        Parameters
        ----------
        tokens, **inputs
            As for calling the model.
        rows
            The gathered token table, [vocab_size, d_model]; None gathers it.

        Returns
        -------
        array [batch, tokens, d_model]
            The residual stream.
        """
        metadata = self._metadata(tokens, inputs)
        tokens = self.layout.reorder(jnp.asarray(tokens))
        _, key = split_layer_keys(self.config, inputs.get("dropout_key"))
        return self._embed(tokens, lookup_positions(inputs, metadata), key, rows)

    def run_blocks(
        self,
        x: Float[Array, "B T D"],
        tokens: Ids,
        *,
        layers: LayerRange | None = None,
        drop_tokens: bool = True,
        **inputs: Unpack[GPTInputs],
    ) -> tuple[Float[Array, "B T D"], list[AuxLosses]]:
        """Apply all blocks, or those of a pipeline stage, to the residual stream.

        Parameters
        ----------
        x
            Output of `embed_tokens` or of the previous stage.
        tokens, **inputs
            As for calling the model.
        layers
            Blocks that the parameters of this model hold; None is all.
        drop_tokens
            Whether to enforce the capacity of experts.

        Returns
        -------
        x
            Residual stream after the last block.
        aux_losses
            Auxiliary losses of each stack of blocks, arrays [layers].
        """
        metadata = self._metadata(tokens, inputs)
        keys, _ = split_layer_keys(self.config, inputs.get("dropout_key"))
        embedded, shared = x, self._shared_values(x, tokens)

        def step(x: Array, layer: tuple[Block, Array | None], window: int | None) -> Any:
            block, key = layer
            x, _, aux_losses = block(
                block.mix_embeddings(x, embedded),
                *metadata,
                window=window,
                shared_values=shared,
                dropout_key=key,
                drop_tokens=drop_tokens,
            )
            return x, aux_losses

        return run_layers(self.config, step, x, self._stacks(), keys, layers)

    def token_losses(
        self,
        x: Float[Array, "B T D"],
        labels: Ids,
        rows: Float[Array, "V D"] | None = None,
    ) -> tuple[Float32[Array, "B T"], AuxLosses]:
        """Compute the cross-entropy of each label from the output of the last block.

        Parameters
        ----------
        x
            Output of the last block, [batch, tokens, d_model], tokens in device order.
        labels
            Token ids to predict, [batch, tokens]; the loss of -100 is 0.
        rows
            The gathered token table, as for `embed_tokens`.

        Returns
        -------
        tokens : float32 array [batch, tokens]
            Losses in nats.
        aux_losses : AuxLosses
            "z_loss" with `config.z_loss`, float32 [1], else empty.
        """
        return head_losses(
            gather_sequence(self.layout, self._final_norm(x)) * self.logit_scale,
            self._head_rows() if rows is None else rows,
            labels,
            soft_cap=self.config.logit_soft_cap,
            vocab_size=self.config.tokenizer_size or self.config.vocab_size,
            token_shards=self.layout.token_shards,
            keep_logits=self.layout.keep_logits,
            z_loss=self.config.z_loss,
        )

    def logits(self, x: Float[Array, "*any D"]) -> Float32[Array, "*any V"]:
        """Compute logits from hidden states (a result of `hidden`).

        Parameters
        ----------
        x
            Hidden states, [..., d_model].

        Returns
        -------
        float32 array [..., vocab_size]
            Logits.
        """
        return head_logits(
            x * self.logit_scale,
            self._head_rows(),
            soft_cap=self.config.logit_soft_cap,
            vocab_size=self.config.vocab_size,
            tokenizer_size=self.config.tokenizer_size,
        )

    def hidden(self, tokens: Ids, **inputs: Unpack[GPTInputs]) -> Float[Array, "B T D"]:
        """Compute the normalized output of the last block; parameters as for calling the model.

        Parameters
        ----------
        tokens, **inputs
            As for calling the model.

        Returns
        -------
        array [batch, tokens, d_model]
            Hidden states.
        """
        x = self.embed_tokens(tokens, **inputs)
        x, _ = self.run_blocks(x, tokens, drop_tokens=False, **inputs)
        return self.layout.restore(self._final_norm(x))

    def unstacked_blocks(self) -> list[Block]:
        """Return the blocks as a list, for `prefill` and `decode`."""
        return unstack_layers(self._stacks())

    def prefill(
        self, blocks: list[Block], tokens: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], list[KVCache]]:
        """Compute the hidden states and KV cache entries of prompts.

        Parameters
        ----------
        blocks
            Result of `unstacked_blocks`.
        tokens
            Token ids of the prompts, [batch, tokens].

        Returns
        -------
        hidden
            As from `hidden`.
        cache
            KV cache entries of each block.
        """
        check_tokens(self.config, tokens, None, vocab_size=self.config.vocab_size)
        positions = default_positions(tokens.shape[1], None)
        x = embedded = self._embed(tokens, positions, None)
        shared = self._shared_values(x, tokens, blocks)
        cache = []
        for block, window in zip(blocks, self.config.windows, strict=True):
            x = block.mix_embeddings(x, embedded)
            x, entries, _ = block(
                x, positions, window=window, shared_values=shared, drop_tokens=False
            )
            cache.append(entries)
        return self._final_norm(x), cache

    def decode(
        self,
        blocks: list[Block],
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: list[KVCache],
    ) -> tuple[Float32[Array, "B T V"], list[KVCache]]:
        """Decode one or a few new tokens of each row with the KV cache; inside of `jax.jit`.

        Parameters
        ----------
        blocks
            Result of `unstacked_blocks`, computed once for all tokens.
        tokens, positions
            New tokens of each row and their consecutive positions.
        cache
            KV cache of each block.

        Returns
        -------
        logits
            Logits of the token after each new token.
        cache
            KV cache with the new tokens.
        """
        x = embedded = self._embed(tokens, positions, None)
        shared = self._shared_values(x, tokens, blocks)
        new_cache = []
        for block, window, entries in zip(blocks, self.config.windows, cache, strict=True):
            x = block.mix_embeddings(x, embedded)
            x, entries = block.decode(x, entries, positions, window=window, shared_values=shared)
            new_cache.append(entries)
        return self.logits(self._final_norm(x)), new_cache

    def _metadata(self, tokens: Ids, inputs: GPTInputs) -> TokenMetadata:
        metadata = make_token_metadata(
            self.config, tokens, inputs.get("positions"), None, inputs.get("segment_ids"),
            vocab_size=self.config.vocab_size,
        )  # fmt: skip
        ordered: TokenMetadata = jax.tree.map(self.layout.reorder, metadata)
        return ordered

    def _stacks(self) -> list[Stack]:
        return layer_stacks(self.stack_windows, self.dense_blocks, self.blocks)

    def _embed(
        self, tokens: Ids, positions: Array | None, key: Array | None, rows: Array | None = None
    ) -> Float[Array, "B T D"]:
        x = self.wte(jnp.asarray(tokens), rows)
        if self.config.positions == "sinusoidal" and self.config.scale_embeddings:
            x = math.sqrt(self.config.d_model) * x
        if self.config.embedding_scale is not None:
            x = self.config.embedding_scale * x
        return embed(self.config, x, positions, self.wpe, dropout_key=key, layout=self.layout)

    def _shared_values(self, *inputs: Any) -> Float[Array, "B T K H"] | None:
        return None if self.config.value_mix == "none" else shared_values(self, *inputs)

    def _final_norm(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return x if self.ln_f is None else self.ln_f(x)

    def _head_rows(self) -> Float[Array, "rows D"]:
        return (self.wte if self.head is None else self.head).rows()
