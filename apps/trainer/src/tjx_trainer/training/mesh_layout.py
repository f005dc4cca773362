"""Layout of a model on the mesh of a run."""

import jax

import tjx_kernels
import tjx_nn
import tjx_parallel
from tjx_nn.layout import SINGLE_DEVICE
from tjx_nn.models.encoder_decoder_config import EncoderDecoderConfig
from tjx_nn.models.gpt_config import GPTConfig
from tjx_trainer.config.run_config import ModelConfig


class ModelLayout(tjx_parallel.MeshLayout, tjx_nn.Layout):
    """Layout of tjx_nn models on a mesh of several devices."""


def make_layout(
    model: ModelConfig,
    mesh: jax.sharding.Mesh,
    rules: tjx_parallel.ShardingRules,
    choices: tjx_parallel.MeshConfig,
) -> tjx_nn.Layout:
    """Return the layout of a model on a mesh; `SINGLE_DEVICE` for a mesh of one device."""
    if mesh.size == 1:
        return SINGLE_DEVICE
    causal = isinstance(model, GPTConfig | EncoderDecoderConfig)
    balanced = causal and choices.context_kind == "ring"
    # XLA's gradient of a gather is a scatter with atomics on GPUs.
    on_gpus = mesh.devices.flat[0].platform not in ("cpu", "tpu")
    return ModelLayout(
        mesh,
        rules,
        choices,
        attention=tjx_kernels.sharded_flash_attention,
        token_order=(tjx_kernels.zigzag, tjx_kernels.unzigzag) if balanced else None,
        take=tjx_kernels.embedding_lookup if on_gpus else None,
    )
