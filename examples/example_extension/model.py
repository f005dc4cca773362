"""A model family: one layer of attention between an embedding and a linear head."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tjx_kernels import flash_attention
from tjx_nn import Losses, TransformerConfig, cross_entropy, register


@dataclass(frozen=True, kw_only=True)
class OneLayerConfig(TransformerConfig):
    """Configuration of `OneLayer`.

    Attributes
    ----------
    family
        Name of the model family.
    vocab_size
        Number of token ids.
    residual_scale
        Factor of the embedding in the residual sum.
    """

    family: str = __name__
    vocab_size: int = 16
    residual_scale: float = 1.0


class OneLayer(nnx.Module):
    """Attention over embeddings, without positions."""

    def __init__(self, config: OneLayerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        init = nnx.initializers.normal(0.3)
        shape = (config.vocab_size, config.d_model)
        # Logical axes for the sharding rules; without them, a parameter is replicated.
        self.embedding = nnx.Param(
            init(rngs.params(), shape), out_sharding=("vocab", "embed"), eager_sharding=False
        )
        self.qkv = nnx.Linear(config.d_model, 3 * config.d_model, use_bias=False, rngs=rngs)
        self.head = nnx.Linear(config.d_model, config.vocab_size, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return logits [batch, tokens, vocab_size]; evaluations with accuracies need them."""
        x = self.embedding[tokens]
        heads = (*x.shape[:2], self.config.n_head, self.config.head_dim)
        q, k, v = (part.reshape(heads) for part in jnp.split(self.qkv(x), 3, axis=-1))
        implementation = self.config.attention_implementation
        mixed = flash_attention(q, k, v, causal=True, implementation=implementation)
        return self.head(self.config.residual_scale * x + mixed.reshape(x.shape))

    def losses(
        self, tokens: jax.Array, labels: jax.Array, *, dropout_key: jax.Array | None = None
    ) -> Losses:
        """Return the loss of each label; the arguments are the arrays of the task's batches."""
        del dropout_key  # this model has no dropout
        no_aux_losses: dict[str, Any] = {}
        return Losses(cross_entropy(self(tokens), labels), jnp.zeros(()), no_aux_losses)


register(OneLayerConfig, OneLayer)
