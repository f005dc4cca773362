"""Multi-token prediction: a loss of the token after next (`GPTConfig.multi_token_loss`).

Source: DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", section 2.2, with one module (D = 1).

Axes in names: B batch, T time, D d_model, V vocabulary.
"""

from typing import TYPE_CHECKING, Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tjx_nn.id_checks import IGNORE_INDEX
from tjx_nn.inputs import GPTInputs, Ids, TokenMetadata
from tjx_nn.layers.block import Block
from tjx_nn.layers.embedding import make_token_metadata
from tjx_nn.layers.make_layers import linear, make_norm
from tjx_nn.layers.scan_layers import AuxLosses, clone_key, run_layers
from tjx_nn.layers.stack_blocks import stack_layers
from tjx_nn.layout import RESIDUAL_AXES, ShardedModule, gather_sequence, scatter_sequence
from tjx_nn.losses import head_losses
from tjx_nn.models.gpt_config import GPTConfig

if TYPE_CHECKING:
    from tjx_nn.models.gpt import GPT


class MultiToken(ShardedModule):
    """Module that computes a hidden state of the token after next, for the shared output head.

    A projection of the concatenated residual stream of a token and embedding of the next token,
    both normalized, then a block without experts and a final norm.

    Parameters
    ----------
    config
        Configuration of the model. The block has the window of the last one.
    rngs
        Source of random initial values.
    """

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs) -> None:
        self.config, d = config, config.d_model
        self.ln_hidden, self.ln_token = make_norm(config), make_norm(config)
        self.projection = linear(config, ("mlp", "embed"), (2 * d, d), float8=False, rngs=rngs)
        # A stack of one block, as `run_layers` applies the rematerialization of the model.
        self.blocks = stack_layers(lambda r: Block(config, rngs=r), 1, rngs)
        self.ln_f = make_norm(config) if config.has_final_norm else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        next_tokens: Float[Array, "B T D"],
        metadata: TokenMetadata,
        dropout_key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], list[AuxLosses]]:
        """Compute the hidden states of the output head, tokens in device order.

        Parameters
        ----------
        x
            Residual stream after the last block of the model.
        next_tokens
            Embedding of the token after each one.
        metadata
            Positions and segment ids of the tokens of `x`.
        dropout_key
            PRNG key of dropout; None disables it.

        Returns
        -------
        hidden
            Hidden states, normalized.
        aux_losses
            Auxiliary losses of the block.
        """
        next_tokens = self.layout.place(next_tokens.astype(x.dtype), RESIDUAL_AXES)
        both = jnp.concatenate([self.ln_hidden(x), self.ln_token(next_tokens)], -1)
        x = scatter_sequence(self.layout, self.projection(gather_sequence(self.layout, both)))

        def step(x: Array, layer: tuple[Block, Array | None], window: int | None) -> Any:
            block, key = layer
            x, _, aux_losses = block(x, *metadata, window=window, dropout_key=key)
            return x, aux_losses

        stacks = [(self.blocks, self.config.windows[-1:])]
        keys = None if dropout_key is None else dropout_key[None]
        x, aux_losses = run_layers(self.config, step, x, stacks, keys)
        return x if self.ln_f is None else self.ln_f(x), aux_losses


def multi_token_losses(
    model: "GPT",
    x: Float[Array, "B T D"],
    tokens: Ids,
    labels: Ids,
    rows: Float[Array, "V D"] | None = None,
    **inputs: Unpack[GPTInputs],
) -> list[AuxLosses]:
    """Compute the loss of the token after next, by the module `model.multi_token`.

    The sum of the cross-entropies is divided by the number of labels of the model, as in equation
    24 of the source, so that microbatches of any size add up to the loss of their batch.

    Parameters
    ----------
    model
        A model with `config.multi_token_loss`.
    x
        Residual stream after the last block, tokens in device order.
    tokens, labels, **inputs
        As for `GPT.losses`. The label after each one is predicted, unless it is ignored or belongs
        to another segment.
    rows
        The gathered token table, [vocab_size, d_model]; None gathers it.

    Returns
    -------
    list of AuxLosses
        "multi_token_loss", float32 [1], and the auxiliary losses of the module's block.
    """
    module, config, layout = model.multi_token, model.config, model.layout
    assert module is not None
    segment_ids, key = inputs.get("segment_ids"), inputs.get("dropout_key")
    metadata = make_token_metadata(
        config, tokens, inputs.get("positions"), None, segment_ids, vocab_size=config.vocab_size
    )
    # Shifted in natural order: layouts permute tokens.
    next_tokens, next_labels = _shift(tokens, labels, segment_ids)
    table = model.wte.rows() if rows is None else rows
    hidden, aux_losses = module(
        x,
        model.wte(layout.reorder(next_tokens), table),
        jax.tree.map(layout.reorder, metadata),
        # `split_layer_keys` uses the numbers up to n_layer.
        None if key is None else jax.random.fold_in(clone_key(key), config.n_layer + 1),
    )
    losses, _ = head_losses(
        gather_sequence(layout, hidden) * model.logit_scale,
        table if model.head is None else model.head.rows(),
        layout.reorder(next_labels),
        soft_cap=config.logit_soft_cap,
        vocab_size=config.tokenizer_size or config.vocab_size,
        token_shards=layout.token_shards,
        keep_logits=layout.keep_logits,
    )
    count = jnp.maximum((jnp.asarray(labels) != IGNORE_INDEX).sum(), 1)
    return [*aux_losses, {"multi_token_loss": (losses.sum() / count)[None]}]


def _shift(
    tokens: Ids, labels: Ids, segment_ids: Ids | None
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Return the token and the label after each one; labels of other segments are ignored."""
    has_next = jnp.arange(tokens.shape[1])[None] < tokens.shape[1] - 1
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
        has_next &= segment_ids == jnp.roll(segment_ids, -1, 1)
    next_labels = jnp.where(has_next, jnp.roll(labels, -1, 1), IGNORE_INDEX)
    return jnp.roll(tokens, -1, 1), next_labels
