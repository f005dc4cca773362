"""GPT: a decoder-only transformer, by default exactly GPT-2.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners": learned positions, norms
before the sublayers and one after the last block, a GELU MLP, an output head tied to the token
table.

Axes in names: B batch, T time, S slots of the key-value cache, D d_model, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from tjx_kernels import linear_cross_entropy
from tjx_nn.config import GPTConfig
from tjx_nn.layers import MLP, Attention, Constrain, Embedding, KeysValues, LayerNorm
from tjx_nn.tokens import Ids, Positions, check_tokens, default_positions


class Block(nnx.Module):
    """Attention, then an MLP, each reading a normalised residual stream and adding to it."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs) -> None:
        norm = functools.partial(
            LayerNorm, config.d_model, eps=config.layer_norm_eps, bias=config.bias
        )
        self.ln_1 = norm()
        self.attention = Attention(config, rngs=rngs)
        self.ln_2 = norm()
        self.mlp = MLP(config, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        dropout_key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], KeysValues]:
        """Return the residual stream after this block, and the block's keys and values."""
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        attended, kv = self.attention(self.ln_1(x), segment_ids=segment_ids)
        x = x + self._drop(attended, keys[0])
        return x + self._drop(self.mlp(self.ln_2(x)), keys[1]), kv

    def decode(
        self, x: Float[Array, "B 1 D"], cache: KeysValues, positions: Int[Array, " B"]
    ) -> tuple[Float[Array, "B 1 D"], KeysValues]:
        """Advance by one token a row, with this block's cache."""
        attended, cache = self.attention.decode(self.ln_1(x), cache, positions)
        x = x + attended
        return x + self.mlp(self.ln_2(x)), cache

    def _drop(self, x: Float[Array, "B T D"], key: Array | None) -> Float[Array, "B T D"]:
        return self.dropout(x, deterministic=key is None, rngs=key)


class GPT(nnx.Module):
    """A decoder-only transformer.

    The parameters of all blocks are stacked: each has a leading axis "layers".

    Parameters
    ----------
    config
        Sizes and choices.
    rngs
        Source of the initial values: normal(0, 0.02), projections into the residual stream
        normal(0, 0.02 / sqrt(2 * n_layer)), biases 0, norm scales 1.
    """

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.constrain: Constrain | None = None  # set by `bind`
        d = config.d_model
        self.wte = Embedding(config.vocab_size, d, axes=("vocab", "embed"), rngs=rngs)
        self.wpe = Embedding(config.max_seq_len, d, axes=("seq", "embed"), rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout)
        self.blocks = nnx.vmap(lambda r: Block(config, rngs=r))(rngs.split(config.n_layer))
        self.ln_f = LayerNorm(d, eps=config.layer_norm_eps, bias=config.bias)

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
            Row of the position table for each token. None counts from 0, and from 0 again at the
            start of each segment.
        segment_ids
            Document that each token belongs to, where several are packed in a row; tokens see only
            their own document.
        dropout_key
            Key of this step's dropout. None means no dropout: give a key exactly when training.

        Raises
        ------
        ValueError
            If the sequence is longer than `max_seq_len`, or, outside `jax.jit`, if a token is not
            in the vocabulary or a position not in the position table.
        """
        return self.logits(
            self.hidden(
                tokens, positions=positions, segment_ids=segment_ids, dropout_key=dropout_key
            )
        )

    def token_losses(
        self,
        tokens: Ids,
        labels: Ids,
        *,
        positions: Positions | None = None,
        segment_ids: Ids | None = None,
        dropout_key: Array | None = None,
    ) -> Float32[Array, "B T"]:
        """Return the cross-entropy of each label in nats, without holding all logits.

        Parameters
        ----------
        tokens, positions, segment_ids, dropout_key
            As for calling the model.
        labels
            Ids of the tokens to predict; where it is -100 the loss is 0.
        """
        x = self.hidden(
            tokens, positions=positions, segment_ids=segment_ids, dropout_key=dropout_key
        )
        # The table stays float32, so that its gradient is summed in float32.
        return linear_cross_entropy(x, self.wte.table(self.constrain), jnp.asarray(labels))

    def logits(self, x: Float[Array, "*any D"]) -> Float32[Array, "*any V"]:
        """Multiply normalised hidden vectors with the token table."""
        table_VD = self.wte.table(self.constrain).astype(x.dtype)
        return jnp.einsum("...d,vd->...v", x, table_VD, preferred_element_type=jnp.float32)

    def hidden(
        self,
        tokens: Ids,
        *,
        positions: Positions | None = None,
        segment_ids: Ids | None = None,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B T D"]:
        """Return the normalised output of the last block; parameters as for calling the model."""
        return self._run(tokens, positions, segment_ids, dropout_key, keep_kv=False)[0]

    def prefill(self, tokens: Ids) -> tuple[Float[Array, "B T D"], list[KeysValues]]:
        """Return what `hidden` returns, and the keys and values of each block for a cache."""
        x, kv = self._run(tokens, None, None, None, keep_kv=True)
        assert kv is not None
        return x, [(kv[0][layer], kv[1][layer]) for layer in range(self.config.n_layer)]

    def unstacked_blocks(self) -> list[Block]:
        """Return the blocks one by one, as `decode` wants them."""
        layers = range(self.config.n_layer)
        return [jax.tree.map(lambda p, i=layer: p[i], self.blocks) for layer in layers]

    def decode(
        self,
        blocks: list[Block],
        tokens: Int[Array, " B"],
        positions: Int[Array, " B"],
        cache: list[KeysValues],
    ) -> tuple[Float32[Array, "B V"], list[KeysValues]]:
        """Advance by one token a row; inside `jax.jit`.

        Parameters
        ----------
        blocks
            `unstacked_blocks()`: taken apart once, outside the loop over tokens.
        tokens, positions
            The new token of each row and its position.
        cache
            Keys and values of each block; slot s holds position s.

        Returns
        -------
        tuple
            Logits of the token after, and the cache with the new tokens in it.
        """
        x = self._embed(tokens[:, None], positions[:, None], None)
        new_cache = []
        for block, kv in zip(blocks, cache, strict=True):
            x, kv = block.decode(x, kv, positions)
            new_cache.append(kv)
        return self.logits(self.ln_f(x)[:, 0]), new_cache

    def _run(
        self,
        tokens: Ids,
        positions: Positions | None,
        segment_ids: Ids | None,
        dropout_key: Array | None,
        *,
        keep_kv: bool,
    ) -> tuple[Float[Array, "B T D"], Any]:
        config = self.config
        check_tokens(config, tokens, positions)
        segments = None if segment_ids is None else jnp.asarray(segment_ids)
        if positions is None:
            positions = default_positions(tokens.shape[1], segments)
        keys = None
        if dropout_key is not None and config.dropout > 0:
            keys = jax.random.split(dropout_key, config.n_layer + 1)

        def step(
            x: Float[Array, "B T D"], layer: tuple[Block, Array | None]
        ) -> tuple[Float[Array, "B T D"], KeysValues | None]:
            block, key = layer
            x, kv = block(x, segment_ids=segments, dropout_key=key)
            return self._place(x), kv if keep_kv else None

        if config.remat == "full":
            # Inside a loop the compiler cannot merge the second computation with the first.
            step = jax.checkpoint(step, prevent_cse=not config.scan_layers)
        x = self._embed(tokens, positions, None if keys is None else keys[-1])
        layers = (self.blocks, None if keys is None else keys[:-1])
        x, kv = jax.lax.scan(step, x, layers, unroll=1 if config.scan_layers else config.n_layer)
        return self.ln_f(x), kv

    def _embed(self, tokens: Ids, positions: Positions, key: Array | None) -> Float[Array, "B T D"]:
        x = self.wte(jnp.asarray(tokens), constrain=self.constrain)
        x = x + self.wpe(jnp.asarray(positions), constrain=self.constrain)
        x = self._place(x.astype(self.config.dtype))
        y: Array = self.dropout(x, deterministic=key is None, rngs=key)
        return y

    def _place(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return x if self.constrain is None else self.constrain(x, ("batch", "seq", "embed"))
