"""Weights for decoding: cast to the computation dtype and unstacked into blocks, once.

In a loop over tokens, slicing stacked parameters or casting them would copy them in every step.
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from tjx_nn.binding import Params, bind
from tjx_nn.models.encoder_decoder_config import EncoderDecoderConfig
from tjx_nn.models.gpt_config import GPTConfig
from tjx_nn.quantization.kernels import is_quantized


class DecodeWeights(NamedTuple):
    """Parameters and unstacked blocks of a model that generates.

    Attributes
    ----------
    params
        Parameters of the model; those outside of blocks are used.
    blocks
        Blocks for `prefill` and `decode`.
    """

    params: Params
    blocks: list[Any]


def make_decode_weights(config: GPTConfig | EncoderDecoderConfig, params: Params) -> DecodeWeights:
    """Make the decoding weights of a model, outside of `jax.jit`.

    On a CPU, parameters in the computation dtype are not copied: the blocks are views of them.
    While the blocks are alive, donating the parameters to a program does not free their buffers.
    """
    if _needs_no_copy(config, params):
        host = bind(config, jax.device_get(params))
        return DecodeWeights(
            params, jax.device_put(host.unstacked_blocks(), _devices(params).pop())
        )
    return DecodeWeights(params, _copied(params, config=config))


def bind_decode_weights(config: GPTConfig | EncoderDecoderConfig, weights: DecodeWeights) -> Any:
    """Make the model of decoding weights, inside of `jax.jit`; do not use its stacked blocks."""
    return bind(config, _cast(weights.params, config.dtype))


def _cast(params: Params, dtype: str) -> Params:
    """Cast kernels and tables; norms, biases and the routers of experts stay float32."""

    def cast(path: tuple[Any, ...], p: Any) -> Any:
        *layers, name = (step.key for step in path)
        matrix = name in ("kernel", "embedding") and layers[-1] != "router" and not is_quantized(p)
        return p.astype(dtype) if matrix else p

    cast_params: Params = jax.tree.map_with_path(cast, params, is_leaf=is_quantized)
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
    """Return the devices of the parameters; NumPy arrays have none."""
    arrays = [p for p in jax.tree.leaves(params) if isinstance(p, jax.Array)]
    return set().union(*(p.sharding.device_set for p in arrays))
