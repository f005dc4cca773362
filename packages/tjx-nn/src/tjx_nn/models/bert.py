"""BERT: bidirectional encoder with a masked-language-model head and a sequence classifier.

Devlin et al. 2018, "BERT: Pre-training of Deep Bidirectional Transformers".

Axes in names: B batch, T time, D d_model, V vocabulary, C classes.
"""

from typing import Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from tjx_nn.id_checks import check_ids
from tjx_nn.inputs import Ids, TokenMetadata
from tjx_nn.layers.block import split_key
from tjx_nn.layers.dropout import dropout
from tjx_nn.layers.embedding import (
    Embedding,
    embed,
    lookup_positions,
    make_token_metadata,
    position_table,
)
from tjx_nn.layers.make_layers import linear, make_norm
from tjx_nn.layers.mlp import ACTIVATIONS
from tjx_nn.layers.scan_layers import AuxLosses, LayerRange, split_layer_keys
from tjx_nn.layout import ShardedModule, gather_sequence, make_param
from tjx_nn.logits import head_logits
from tjx_nn.losses import Losses, combine_losses, head_losses
from tjx_nn.models.bert_config import BertConfig
from tjx_nn.models.encoder import Encoder
from tjx_nn.models.encoder_inputs import BertInputs


class MLMHead(nnx.Module):
    """Masked-language-model head: dense layer, activation and norm before the tied token table.

    Parameters
    ----------
    config
        Configuration of the model.
    rngs
        Source of random initial values.
    """

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs) -> None:
        d = config.d_model
        self.activation = ACTIVATIONS[config.activation]
        self.dense = linear(config, ("embed", "mlp"), (d, d), float8=False, rngs=rngs)
        self.norm = make_norm(config)
        zeros = jnp.zeros(config.vocab_size, jnp.float32)
        self.bias = make_param(zeros, ("vocab",)) if config.has_logit_bias else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Transform hidden states to the input of the token table."""
        y: Array = self.norm(self.activation(self.dense(x)))
        return y


class Bert(ShardedModule):
    """Bidirectional transformer encoder for masked language modeling and classification.

    Parameters
    ----------
    config
        Configuration of the model.
    rngs
        Source of random initial values, with the distributions of `GPT`.
    """

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        d, std, types = config.d_model, config.init_std, config.n_token_types
        self.wte = Embedding(config.vocab_size, d, std=std, rngs=rngs)
        self.wpe = position_table(config, rngs=rngs)
        self.wtt = (
            Embedding(types, d, axes=("position", "embed"), std=std, rngs=rngs) if types else None
        )
        self.ln_e = make_norm(config)
        self.encoder = Encoder(config, rngs=rngs)
        self.head = MLMHead(config, rngs=rngs)
        classes = config.n_classes
        self.pooler = (
            linear(config, ("embed", "mlp"), (d, d), float8=False, rngs=rngs) if classes else None
        )
        self.classifier = (
            linear(config, ("embed", None), (d, classes), float8=False, rngs=rngs)
            if classes
            else None
        )

    def __call__(self, tokens: Ids, **inputs: Unpack[BertInputs]) -> Float32[Array, "B T V"]:
        """Compute the logits of the original token at each position.

        Parameters
        ----------
        tokens
            Token ids, [batch, tokens], some replaced by the mask token. Inside of `jax.jit`
            out-of-range ids are clipped.
        **inputs
            See `BertInputs`.

        Returns
        -------
        Array
            Logits, float32 [batch, tokens, vocab_size].

        Raises
        ------
        ValueError
            If the sequence exceeds `max_seq_len`, or, outside of `jax.jit`, a token id, token type
            or position is out of range.
        """
        return self.logits(self.hidden(tokens, **inputs))

    def losses(self, tokens: Ids, labels: Ids, **inputs: Unpack[BertInputs]) -> Losses:
        """Compute the masked-language-model losses, without materializing all logits.

        Parameters
        ----------
        tokens, **inputs
            As for calling the model.
        labels
            Original ids of masked tokens; the loss of -100 is 0.

        Returns
        -------
        Losses
            Loss of each label in nats, float32 [batch, tokens], and auxiliary losses.
        """
        rows = self.wte.rows()  # gathered once for the embedding and the head
        x = self.embed_tokens(tokens, rows, **inputs)
        x, stack_losses = self.run_blocks(x, tokens, **inputs)
        losses, z_loss = self.token_losses(x, self.layout.reorder(labels), rows)
        return combine_losses(self.config, self.layout.restore(losses), [*stack_losses, z_loss])

    def embed_tokens(
        self,
        tokens: Ids,
        rows: Float[Array, "V D"] | None = None,
        **inputs: Unpack[BertInputs],
    ) -> Float[Array, "B T D"]:
        """Compute the residual stream before the first block, as `GPT.embed_tokens`.

        Parameters
        ----------
        tokens, rows, **inputs
            As for `GPT.embed_tokens` and calling the model.

        Returns
        -------
        array [batch, tokens, d_model]
            The residual stream.
        """
        _, last = split_layer_keys(self.config, inputs.get("dropout_key"))
        return embed(
            self.config,
            self._with_types(tokens, inputs.get("token_types"), rows),
            lookup_positions(inputs, self._metadata(tokens, inputs)),
            self.wpe,
            norm=self.ln_e,
            dropout_key=last,
            layout=self.layout,
        )

    def run_blocks(
        self,
        x: Float[Array, "B T D"],
        tokens: Ids,
        *,
        layers: LayerRange | None = None,
        drop_tokens: bool = True,
        **inputs: Unpack[BertInputs],
    ) -> tuple[Float[Array, "B T D"], list[AuxLosses]]:
        """Apply the blocks to the residual stream, as `GPT.run_blocks`.

        Parameters
        ----------
        x, tokens, layers, drop_tokens, **inputs
            As for `GPT.run_blocks`.

        Returns
        -------
        x : array [batch, tokens, d_model]
            The residual stream after the blocks.
        aux_losses : list of AuxLosses
            Auxiliary losses of each block.
        """
        keys, _ = split_layer_keys(self.config, inputs.get("dropout_key"))
        metadata = self._metadata(tokens, inputs)
        return self.encoder(x, metadata, dropout_keys=keys, drop_tokens=drop_tokens, layers=layers)

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
            Output of the last block, [batch, tokens, d_model].
        labels
            Original ids of masked tokens, [batch, tokens]; the loss of -100 is 0.
        rows
            The gathered token table, as for `embed_tokens`.

        Returns
        -------
        tokens : float32 array [batch, tokens]
            Losses in nats.
        aux_losses : AuxLosses
            "z_loss" with `config.z_loss`, float32 [1], else empty.
        """
        table, bias = self._head_table(rows)
        x = gather_sequence(self.layout, self.encoder.final_norm(x))
        return head_losses(
            self._head_input(x),
            table,
            labels,
            bias=bias,
            vocab_size=self.config.tokenizer_size,
            token_shards=self.layout.token_shards,
            keep_logits=self.layout.keep_logits,
            z_loss=self.config.z_loss,
        )

    def logits(self, x: Float[Array, "B T D"]) -> Float32[Array, "B T V"]:
        """Compute logits from hidden states (a result of `hidden`).

        Parameters
        ----------
        x
            Hidden states, [batch, tokens, d_model].

        Returns
        -------
        float32 array [batch, tokens, vocab_size]
            Logits of the masked-language-model head.
        """
        table, bias = self._head_table()
        size = self.config.tokenizer_size
        return head_logits(self._head_input(x), table, bias=bias, tokenizer_size=size)

    def hidden(self, tokens: Ids, **inputs: Unpack[BertInputs]) -> Float[Array, "B T D"]:
        """Compute the output of the last block; parameters as for calling the model.

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
        return self.layout.restore(self.encoder.final_norm(x))

    def classify(self, tokens: Ids, **inputs: Unpack[BertInputs]) -> Float32[Array, "B C"]:
        """Compute the class logits of each sequence, from its first token.

        Parameters
        ----------
        tokens, **inputs
            As for calling the model.

        Returns
        -------
        float32 array [batch, classes]
            Logits.

        Raises
        ------
        ValueError
            As for calling the model, and if the sequence is empty or the model has no classes.
        """
        if self.pooler is None or self.classifier is None:
            raise ValueError(
                "config.n_classes: got None; expected the number of classes for classify; set it"
            )
        if tokens.shape[1] == 0:
            raise ValueError(
                "tokens: got an empty sequence; expected at least one token, the classifier's "
                "input; give longer sequences"
            )
        encoder_key, pooler_key = split_key(inputs.get("dropout_key"), 2)
        encoder_inputs: BertInputs = {**inputs, "dropout_key": encoder_key}
        x = self.hidden(tokens, **encoder_inputs)
        pooled_B1D = jnp.tanh(self.pooler(x[:, :1]))
        pooled = dropout(pooled_B1D, self.config.dropout, pooler_key, self.layout)[:, 0]
        y: Array = self.classifier(pooled / self.config.width_multiplier).astype(jnp.float32)
        return y

    def _metadata(self, tokens: Ids, inputs: BertInputs) -> TokenMetadata:
        metadata = make_token_metadata(
            self.config, tokens, inputs.get("positions"), inputs.get("mask"),
            inputs.get("segment_ids"), vocab_size=self.config.vocab_size,
        )  # fmt: skip
        ordered: TokenMetadata = jax.tree.map(self.layout.reorder, metadata)
        return ordered

    def _with_types(
        self, tokens: Ids, types: Ids | None, rows: Array | None
    ) -> Float32[Array, "B T D"]:
        x = self.wte(self.layout.reorder(jnp.asarray(tokens)), rows)
        if self.wtt is None:
            if types is not None:
                raise ValueError(
                    "token_types: got an array; expected None, as n_token_types is 0; omit it"
                )
            return x
        if types is None:
            return x + self.wtt.rows()[:1, None]
        check_ids("token types", types, self.config.n_token_types, "n_token_types")
        return x + self.wtt(self.layout.reorder(jnp.asarray(types)))

    def _head_input(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.head(x) / self.config.width_multiplier  # muP

    def _head_table(
        self, rows: Array | None = None
    ) -> tuple[Float[Array, "V D"], Float32[Array, " V"] | None]:
        bias = self.head.bias
        table = self.wte.rows() if rows is None else rows
        return table, None if bias is None else bias[...]
