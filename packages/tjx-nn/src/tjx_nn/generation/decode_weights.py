"""Weights as a loop over tokens reads them: cast once, and one block at a time.

In a training step the parameters of blocks are stacked; a slice of the stack would be copied in
each turn of the loop, for every token.
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from tjx_nn.functional import Params, bind
from tjx_nn.models.encoder_decoder_config import EncoderDecoderConfig
from tjx_nn.models.gpt_config import GPTConfig


class DecodeWeights(NamedTuple):
    """The parameters, and beside them the blocks of what writes, one by one.

    Attributes
    ----------
    params
        As they were given: what is no block of the model is taken from them.
    blocks
        What `prefill` and `decode` of the model want.
    """

    params: Params
    blocks: list[Any]


def make_decode_weights(config: GPTConfig | EncoderDecoderConfig, params: Params) -> DecodeWeights:
    """Return the weights of a model; outside `jax.jit`.

    On a CPU that needs to cast nothing the blocks are views: nothing is copied. As long as they
    live, the parameters are not overwritten in place by a program that they are donated to.
    """
    if _needs_no_copy(config, params):
        host = bind(config, jax.device_get(params))
        return DecodeWeights(
            params, jax.device_put(host.unstacked_blocks(), _devices(params).pop())
        )
    return DecodeWeights(params, _copied(params, config=config))


def bind_decode_weights(config: GPTConfig | EncoderDecoderConfig, weights: DecodeWeights) -> Any:
    """Return the model of the weights, inside `jax.jit`; its stacked blocks are not to be used."""
    return bind(config, _cast(weights.params, config.dtype))


def _cast(params: Params, dtype: str) -> Params:
    """Cast once, before the loop, what each step would cast: kernels and tables, not norms.

    Routers of experts are float32 whatever the computation is.
    """

    def cast(path: tuple[Any, ...], p: Array) -> Array:
        *_, layer, name = (step.key for step in path)
        matrix = name in ("kernel", "embedding") and layer != "router"
        return p.astype(dtype) if matrix else p

    cast_params: Params = jax.tree.map_with_path(cast, params)
    return cast_params


@functools.partial(jax.jit, static_argnames="config")
def _copied(params: Params, *, config: GPTConfig | EncoderDecoderConfig) -> list[Any]:
    blocks: list[Any] = bind(config, _cast(params, config.dtype)).unstacked_blocks()
    return blocks


def _needs_no_copy(config: GPTConfig | EncoderDecoderConfig, params: Params) -> bool:
    leaves = jax.tree.leaves(params)
    devices = _devices(params)
    return (
        len(devices) == 1
        and {device.platform for device in devices} == {"cpu"}
        and {np.dtype(p.dtype) for p in leaves} == {np.dtype(config.dtype)}
    )


def _devices(params: Params) -> set[jax.Device]:
    """Return where the parameters lie; NumPy arrays lie nowhere yet."""
    arrays = [p for p in jax.tree.leaves(params) if isinstance(p, jax.Array)]
    return set().union(*(p.sharding.device_set for p in arrays))
