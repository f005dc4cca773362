"""Values that all blocks of a decoder mix into theirs (`GPTConfig.value_mix`).

Axes in names: B batch, T time, D d_model, K key heads, H head_dim.
"""

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tjx_nn.attention.mha import split_heads
from tjx_nn.inputs import Ids
from tjx_nn.layers.block import Block
from tjx_nn.layers.embedding import Embedding
from tjx_nn.layers.make_layers import initial_std
from tjx_nn.models.gpt_config import GPTConfig

if TYPE_CHECKING:
    from tjx_nn.models.gpt import GPT


def value_table(config: GPTConfig, *, rngs: nnx.Rngs) -> Embedding | None:
    """Make the table of `value_mix` "embedding", or None without one.

    Its rows start with the variance of the values of a block, whose input is normalized. It is
    sharded like the token table.
    """
    if config.value_mix != "embedding":
        return None
    std = math.sqrt(config.d_model) * initial_std(config, residual=False)
    return Embedding(config.vocab_rows, config.kv_heads * config.head_dim, std=std, rngs=rngs)


def shared_values(
    model: "GPT", x: Float[Array, "B T D"], tokens: Ids, blocks: list[Block] | None = None
) -> Float[Array, "B T K H"]:
    """Compute the values that all blocks of a model with `value_mix` share.

    Parameters
    ----------
    model
        Model whose table or first block gives the values.
    x
        Residual stream before the first block.
    tokens
        Token ids, [batch, tokens].
    blocks
        Unstacked blocks of decoding, where tokens are not in device order; None are the stacks.
    """
    config = model.config
    if model.value_embeddings is not None:
        ids = jnp.asarray(tokens)
        rows = model.value_embeddings(ids if blocks else model.layout.reorder(ids))
        return split_heads(rows.astype(config.dtype), config.head_dim)
    # The first block computes its values once more: inside of a scan all blocks are alike.
    stack = model.blocks if model.dense_blocks is None else model.dense_blocks
    first: Block = blocks[0] if blocks else jax.tree.map(lambda p: p[0], stack)
    return first.values(first.mix_embeddings(x, x))
