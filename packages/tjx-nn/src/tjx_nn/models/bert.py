"""BERT: an encoder that fills in hidden tokens, and sorts texts into classes.

Devlin et al. 2018, "BERT: Pre-training of Deep Bidirectional Transformers".

Axes in names: B batch, T time, D d_model, V vocabulary, C classes.
"""

from typing import Unpack

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from tjx_nn.attention.mha import AuxLosses, TokenMetadata
from tjx_nn.inputs import BertInputs, make_token_metadata, table_positions
from tjx_nn.layers.block import split
from tjx_nn.layers.dropout import drop
from tjx_nn.layers.embedding import embed, position_table
from tjx_nn.layers.linear import Embedding, linear
from tjx_nn.layers.mlp import ACTIVATIONS
from tjx_nn.layers.norms import make_norm
from tjx_nn.layers.scan_layers import LayerRange, split_layer_keys
from tjx_nn.layout import ShardedModule, gather_sequence
from tjx_nn.losses import Losses, head_logits, head_losses, losses
from tjx_nn.models.bert_config import BertConfig
from tjx_nn.models.encoder import Encoder
from tjx_nn.tokens import Ids, check_ids


class MLMHead(nnx.Module):
    """What stands before the table when hidden tokens are filled in, and the bias after it."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs) -> None:
        d = config.d_model
        self.activation = ACTIVATIONS[config.activation]
        self.dense = linear(config, ("embed", "mlp"), (d, d), float8=False, rngs=rngs)
        self.norm = make_norm(config)
        zeros = jnp.zeros(config.vocab_size, jnp.float32)
        self.bias = nnx.Param(zeros, logical_axes=("vocab",)) if config.bias else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Return what the table of tokens is multiplied with."""
        y: Array = self.norm(self.activation(self.dense(x)))
        return y


class Bert(ShardedModule):
    """A bidirectional transformer.

    Parameters
    ----------
    config
        Sizes and choices.
    rngs
        Source of the initial values, which are those of `GPT`.
    """

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        d, std, types = config.d_model, config.init_std, config.n_token_types
        self.wte = Embedding(config.vocab_size, d, axes=("vocab", "embed"), std=std, rngs=rngs)
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
        """Return the logits of the token that stands at each position.

        Parameters
        ----------
        tokens
            Token ids, some of them hidden behind the mask's id. Inside `jax.jit` ids outside the
            vocabulary are clipped to it.
        **inputs
            See `BertInputs`.

        Raises
        ------
        ValueError
            If the sequence is longer than `max_seq_len`, or, outside `jax.jit`, if a token is not
            in the vocabulary, or a token type or position beyond its table.
        """
        return self.logits(self.hidden(tokens, **inputs))

    def losses(self, tokens: Ids, labels: Ids, **inputs: Unpack[BertInputs]) -> Losses:
        """Return the cross-entropy of each label and the model's other losses.

        All logits are never held at once.

        Parameters
        ----------
        tokens, **inputs
            As for calling the model.
        labels
            The tokens that are hidden; where it is -100 the loss is 0.
        """
        rows = self.wte.rows()  # once for both its uses
        x, reported = self.run_blocks(self.begin(tokens, rows, **inputs), tokens, **inputs)
        found = self.finish(x, self.layout.reorder(labels), rows)
        return losses(self.config, self.layout.restore(found), reported)

    def begin(
        self,
        tokens: Ids,
        rows: Float[Array, "V D"] | None = None,
        **inputs: Unpack[BertInputs],
    ) -> Float[Array, "B T D"]:
        """Return the residual stream before the first block; the parts are as those of `GPT`."""
        _, last = split_layer_keys(self.config, inputs.get("dropout_key"))
        return embed(
            self.config,
            self._with_types(tokens, inputs.get("token_types"), rows),
            table_positions(inputs, self._where(tokens, inputs)),
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
        part: LayerRange | None = None,
        drop: bool = True,
        **inputs: Unpack[BertInputs],
    ) -> tuple[Float[Array, "B T D"], list[AuxLosses]]:
        """Return the residual stream after the last block, and what the stacks report."""
        keys, _ = split_layer_keys(self.config, inputs.get("dropout_key"))
        where = self._where(tokens, inputs)
        return self.encoder(x, where, dropout_keys=keys, drop=drop, part=part)

    def finish(
        self,
        x: Float[Array, "B T D"],
        labels: Ids,
        rows: Float[Array, "V D"] | None = None,
    ) -> Float32[Array, "B T"]:
        """Return the cross-entropy of each label, for what the last block returns."""
        table, bias = self._head_table(rows)
        x = gather_sequence(self.layout, self.encoder.normalised(x))
        shards = self.layout.token_shards
        return head_losses(
            self._transformed(x),
            table,
            labels,
            bias=bias,
            vocab_size=self.config.tokenizer_size,
            token_shards=shards,
        )

    def logits(self, x: Float[Array, "B T D"]) -> Float32[Array, "B T V"]:
        """Return the logits of hidden tokens for what `hidden` returns."""
        table, bias = self._head_table()
        size = self.config.tokenizer_size
        return head_logits(self._transformed(x), table, bias=bias, tokenizer_size=size)

    def hidden(self, tokens: Ids, **inputs: Unpack[BertInputs]) -> Float[Array, "B T D"]:
        """Return the output of the last block; parameters as for calling the model."""
        x, _ = self.run_blocks(self.begin(tokens, **inputs), tokens, drop=False, **inputs)
        return self.layout.restore(self.encoder.normalised(x))

    def classify(self, tokens: Ids, **inputs: Unpack[BertInputs]) -> Float32[Array, "B C"]:
        """Return the logits of each row's class, told by its first token.

        Parameters
        ----------
        tokens, **inputs
            As for calling the model.

        Raises
        ------
        ValueError
            As for calling the model, and for an empty sequence and a model without classes.
        """
        if self.pooler is None or self.classifier is None:
            raise ValueError("n_classes is None: give the configuration a number of classes")
        if tokens.shape[1] == 0:
            raise ValueError("the sequence is empty: classify reads its first token")
        inner, outer = split(inputs.get("dropout_key"), 2)
        inner_inputs: BertInputs = {**inputs, "dropout_key": inner}
        x = self.hidden(tokens, **inner_inputs)
        pooled_B1D = jnp.tanh(self.pooler(x[:, :1]))
        pooled = drop(pooled_B1D, self.config.dropout, outer, self.layout)[:, 0]
        y: Array = self.classifier(pooled / self.config.width_multiplier).astype(jnp.float32)
        return y

    def _where(self, tokens: Ids, inputs: BertInputs) -> TokenMetadata:
        where = make_token_metadata(
            self.config, tokens, inputs.get("positions"), inputs.get("mask"),
            inputs.get("segment_ids"), vocab_size=self.config.vocab_size,
        )  # fmt: skip
        return self.layout.reordered(where)

    def _with_types(
        self, tokens: Ids, types: Ids | None, rows: Array | None
    ) -> Float32[Array, "B T D"]:
        x = self.wte(self.layout.reorder(jnp.asarray(tokens)), rows)
        if self.wtt is None:
            if types is not None:
                raise ValueError("n_token_types is 0: leave token_types out")
            return x
        if types is None:
            return x + self.wtt.rows()[:1, None]
        check_ids("token types", types, self.config.n_token_types, "n_token_types")
        return x + self.wtt(self.layout.reorder(jnp.asarray(types)))

    def _transformed(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.head(x) / self.config.width_multiplier  # muP; 1 without it

    def _head_table(
        self, rows: Array | None = None
    ) -> tuple[Float[Array, "V D"], Float32[Array, " V"] | None]:
        bias = self.head.bias
        table = self.wte.rows() if rows is None else rows
        return table, None if bias is None else bias[...]
