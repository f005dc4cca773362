"""A block: attention, then an MLP, each reading the residual stream and adding to it.

Axes in names: B batch, T time, D d_model.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tjx_nn.attention.mha import Attention, AuxLosses, KVCache, TokenMetadata
from tjx_nn.attention.mla import LatentAttention
from tjx_nn.attention.sparse import SparseAttention
from tjx_nn.config import TransformerConfig
from tjx_nn.layers.dropout import drop
from tjx_nn.layers.mlp import make_mlp
from tjx_nn.layers.moe import Experts
from tjx_nn.layers.norms import LayerNorm, RMSNorm, make_norm
from tjx_nn.layout import ShardedModule, gather_sequence, scatter_sequence


class Block(ShardedModule):
    """Attention, and an MLP or experts.

    Parameters
    ----------
    config
        Sizes and choices.
    causal
        Whether tokens see only themselves and what comes before.
    experts
        Whether there is a mixture of experts in place of the MLP.
    rngs
        Source of the initial values.

    Examples
    --------
    >>> from tjx_nn import Block, GPTConfig, Where
    >>> block = Block(GPTConfig(n_head=2, d_model=8), rngs=nnx.Rngs(0))
    >>> out, cache, measures = block(jnp.ones((1, 3, 8)), Where(jnp.arange(3)[None]))
    >>> out.shape
    (1, 3, 8)
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        causal: bool = True,
        experts: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        self.ln_1 = make_norm(config)
        self.attention = make_attention(config, causal=causal, rngs=rngs)
        self.ln_2 = None if config.parallel_block else make_norm(config)
        self.mlp = Experts(config, rngs=rngs) if experts else make_mlp(config, rngs=rngs)
        self.scale_1, self.scale_2 = layer_scale(config), layer_scale(config)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        where: TokenMetadata,
        *,
        window: int | None = None,
        dropout_key: Array | None = None,
        drop: bool = True,
    ) -> tuple[Float[Array, "B T D"], KVCache, AuxLosses]:
        """Return the residual stream after this block, what a cache keeps, and the measures."""
        keys = split(dropout_key, 3)
        h = self.read(x, self.ln_1)
        with jax.named_scope("attention_layer"):  # as profiles name it
            attended, entries, aux_losses = self.attention(
                h, where, window=window, dropout_key=keys[0]
            )
        x = self.add(x, attended, self.ln_1, self.scale_1, keys[1])
        h = h if self.ln_2 is None else self.read(x, self.ln_2)
        fed, more = self.feed(h, drop=drop)
        return self.add(x, fed, self.ln_2, self.scale_2, keys[2]), entries, aux_losses | more

    def decode(
        self,
        x: Float[Array, "B T D"],
        cache: KVCache,
        where: TokenMetadata,
        *,
        window: int | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Advance by one or a few tokens a row, with this block's cache."""
        h = self.read(x, self.ln_1)
        attended, cache = self.attention.decode(h, cache, where, window=window)
        x = self.add(x, attended, self.ln_1, self.scale_1)
        h = h if self.ln_2 is None else self.read(x, self.ln_2)
        return self.add(x, self.feed(h, drop=False)[0], self.ln_2, self.scale_2), cache

    def read(self, x: Float[Array, "B T D"], norm: LayerNorm | RMSNorm) -> Float[Array, "B T D"]:
        """Return what a sublayer reads of the residual stream."""
        return gather_sequence(self.layout, norm(x) if self.config.norm_position == "pre" else x)

    @jax.named_scope("residual")  # as profiles and plans name it
    def add(
        self,
        x: Float[Array, "B T D"],
        y: Float[Array, "B T D"],
        norm: LayerNorm | RMSNorm | None,
        scale: nnx.Param[Array] | None,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B T D"]:
        """Return the residual stream with a sublayer's output `y` in it."""
        if scale is not None:
            y = y * self.table(scale, ("embed",)).astype(y.dtype)[None, None]
        y = scatter_sequence(self.layout, y)
        x = x + drop(y, self.config.dropout, dropout_key, self.layout)
        return norm(x) if norm is not None and self.config.norm_position == "post" else x

    @jax.named_scope("mlp")  # as profiles name it
    def feed(
        self, h: Float[Array, "B T D"], *, drop: bool = True
    ) -> tuple[Float[Array, "B T D"], AuxLosses]:
        """Run the MLP or the experts; `drop` bounds how many tokens an expert takes."""
        return self.mlp(h, drop=drop) if isinstance(self.mlp, Experts) else (self.mlp(h), {})


def make_attention(
    config: TransformerConfig, *, causal: bool = True, rngs: nnx.Rngs
) -> Attention | LatentAttention:
    """Return the attention that the configuration asks for."""
    if config.latent.kv_dim is not None:
        return LatentAttention(config, causal=causal, rngs=rngs)
    kind = Attention if config.sparse.top_k is None else SparseAttention
    return kind(config, causal=causal, rngs=rngs)


def layer_scale(config: TransformerConfig) -> nnx.Param[Array] | None:
    """Return the factors of a sublayer's output, if the configuration wants them."""
    if config.layer_scale is None:
        return None
    factors = jnp.full(config.d_model, config.layer_scale, jnp.float32)
    return nnx.Param(factors, logical_axes=("embed",))


def split(key: Array | None, count: int) -> list[Array | None]:
    """Split a key that may be absent."""
    return [None] * count if key is None else list(jax.random.split(key, count))
