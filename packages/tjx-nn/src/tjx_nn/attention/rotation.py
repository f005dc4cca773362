"""Rotation of queries and keys, their norm after it, and the temperature of blocks without it.

Axes in names: B batch, T time, N heads, H head_dim.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tjx_nn.config import TransformerConfig
from tjx_nn.layers.position_encoding import apply_rope
from tjx_nn.sub_configs import RopeConfig


def rotate(
    config: TransformerConfig,
    x: Float[Array, "B T N H"],
    positions: Int[Array, "#B T"] | None,
    rope: RopeConfig,
) -> Float[Array, "B T N H"]:
    """Rotate queries or keys; with `qk_norm_position` "after_rope" normalize them then.

    Parameters
    ----------
    config
        Configuration of the model.
    x
        Queries or keys.
    positions
        Position of each token; None counts from 0.
    rope
        Rotary embeddings of the block.
    """
    x = apply_rope(x, positions, rope)
    if not config.qk_norm or config.qk_norm_position == "before_rope":
        return x
    y = x.astype(jnp.float32)
    squares = jnp.square(y).mean(-1, keepdims=True)
    return (y * jax.lax.rsqrt(squares + config.norm_eps)).astype(x.dtype)


def scale_by_position(
    config: TransformerConfig,
    q: Float[Array, "B T N H"],
    positions: Int[Array, "#B T"] | None,
    window: int | None,
) -> Float[Array, "B T N H"]:
    """Scale the queries of a block without rotary embeddings by the logarithm of the position.

    A query at position p is multiplied by 1 + `nope_temperature` * log(1 + (p + 1) //
    `nope_temperature_length`), which sharpens the attention to long contexts.

    Parameters
    ----------
    config
        Configuration of the model.
    q
        Queries.
    positions
        Position of each token; None counts from 0.
    window
        Window of the block, which tells whether it has rotary embeddings.

    References
    ----------
    Nakanishi 2025, "Scalable-Softmax Is Superior for Attention"; Meta AI 2025, "Llama 4".
    """
    if config.block_rope(window) is not None:
        return q
    positions = jnp.arange(q.shape[1])[None] if positions is None else positions
    steps = ((positions + 1) // config.nope_temperature_length).astype(jnp.float32)
    scale = 1 + config.nope_temperature * jnp.log1p(steps)
    return (q.astype(jnp.float32) * scale[..., None, None]).astype(q.dtype)
