"""Attention layers as functions of parameters, for tests of latent and sparse attention."""

import functools
from typing import Any

import jax
import numpy as np
from flax import nnx

from tjx_nn import GPTConfig
from tjx_nn.attention.kv_cache import KVCache
from tjx_nn.binding import Params
from tjx_nn.inputs import TokenMetadata
from tjx_nn.layers.block import make_attention

T = 10


@functools.cache
def abstract(config: GPTConfig) -> tuple[Any, Any]:
    """Return the graph definition and abstract parameters of the layer of a configuration."""
    with jax.transfer_guard("allow"):
        return nnx.split(nnx.eval_shape(lambda: make_attention(config, rngs=nnx.Rngs(0))))


def make_params(config: GPTConfig, seed: int = 0, *, scale: float) -> Params:
    """Return normal values of a standard deviation for all parameters."""
    rng = np.random.default_rng(seed)
    shapes: Params = nnx.to_pure_dict(abstract(config)[1])
    params: Params = jax.tree.map(
        lambda p: (scale * rng.standard_normal(p.shape)).astype(np.float32), shapes
    )
    return params


@functools.partial(jax.jit, static_argnames=("config", "window"))
def decode(
    config: GPTConfig,
    params: Params,
    x: jax.Array,
    cache: KVCache,
    metadata: TokenMetadata,
    window: int | None = None,
) -> tuple[jax.Array, KVCache]:
    """Decode with the layer of a configuration."""
    layer = nnx.merge(abstract(config)[0], params)
    result: tuple[jax.Array, KVCache] = layer.decode(x, cache, metadata.positions, window=window)
    return result


def inputs(batch: int = 2, tokens: int = T, seed: int = 0, *, features: int) -> np.ndarray:
    """Return normal inputs [batch, tokens, features]."""
    values = np.random.default_rng(seed).standard_normal((batch, tokens, features))
    return values.astype(np.float32)


def at(batch: int = 2, start: int = 0, stop: int = T) -> TokenMetadata:
    """Return the metadata of tokens at consecutive positions."""
    return TokenMetadata(
        jax.device_put(np.tile(np.arange(start, stop, dtype=np.int32), (batch, 1)))
    )
