"""Vision encoder of SigLIP: `SiglipVisionModel` and `SiglipForImageClassification`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tjx_nn.hf.convert_config import read_config, write_config
from tjx_nn.hf.families.encoders.images import CLASSES, image_sizes, patch_kernel
from tjx_nn.hf.family import (
    PLAIN_ACTIVATIONS,
    ComputedFields,
    FieldMapping,
    Json,
    ModelFamily,
    TensorMapping,
    concatenated,
    fused_linear,
    leading_axes,
    linear,
    norm,
    same,
    tensor,
)
from tjx_nn.models.vit_config import ViTConfig


def _tensors(prefix: str, config: ViTConfig) -> list[TensorMapping]:
    tables, layer = f"{prefix}embeddings", f"{prefix}encoder.layers.{{layer}}"
    attention, pool = "encoder.blocks.attention", "attention_pool.attention"
    qkv = [f"{pool}.{name}" for name in ("query", "key", "value")]
    kernels, biases = (tuple(f"{each}.{leaf}" for each in qkv) for leaf in ("kernel", "bias"))
    return [
        *tensor("patch.kernel", f"{tables}.patch_embedding.weight", patch_kernel(config)),
        *tensor("patch.bias", f"{tables}.patch_embedding.bias"),
        *tensor("wpe.embedding", f"{tables}.position_embedding.weight"),
        *norm("encoder.blocks.ln_1", f"{layer}.layer_norm1"),
        *linear(f"{attention}.query", f"{layer}.self_attn.q_proj"),
        *linear(f"{attention}.key", f"{layer}.self_attn.k_proj"),
        *linear(f"{attention}.value", f"{layer}.self_attn.v_proj"),
        *linear(f"{attention}.out", f"{layer}.self_attn.out_proj"),
        *norm("encoder.blocks.ln_2", f"{layer}.layer_norm2"),
        *linear("encoder.blocks.mlp.up", f"{layer}.mlp.fc1"),
        *linear("encoder.blocks.mlp.down", f"{layer}.mlp.fc2"),
        *norm("encoder.ln_f", f"{prefix}post_layernorm"),
        *tensor("attention_pool.probe", f"{prefix}head.probe", leading_axes(2)),
        TensorMapping(
            kernels, f"{prefix}head.attention.in_proj_weight", fused_linear([config.d_model] * 3)
        ),
        TensorMapping(biases, f"{prefix}head.attention.in_proj_bias", concatenated(3)),
        *linear(f"{pool}.out", f"{prefix}head.attention.out_proj"),
        *norm("attention_pool.norm", f"{prefix}head.layernorm"),
        *linear("attention_pool.mlp.up", f"{prefix}head.mlp.fc1"),
        *linear("attention_pool.mlp.down", f"{prefix}head.mlp.fc2"),
        *linear("head", "classifier"),
    ]


def _read_pool(config_json: Json) -> dict[str, Any]:
    # Without its head the encoder has no pooled output; the mean has no parameters.
    has_head = config_json.get("vision_use_head", True)
    if type(has_head) is not bool:
        raise ValueError(f"vision_use_head: got {has_head!r}; expected a boolean")
    return {"pool": "map" if has_head else "mean"}


_GELU = "gelu_pytorch_tanh"
SIGLIP_VISION = ModelFamily(
    model_type="siglip_vision_model",
    architecture="SiglipVisionModel",
    config=ViTConfig,
    constants={
        "positions": "learned",
        "norm": "layernorm",
        "norm_position": "pre",
        "bias": True,
        "n_classes": None,
        "n_registers": 0,
        "mask_token": False,
    },
    fields=[
        same("channels", "num_channels", 3),
        same("d_model", "hidden_size", 768),
        same("n_layer", "num_hidden_layers", 12),
        same("n_head", "num_attention_heads", 12),
        same("d_ff", "intermediate_size", 3072),
        FieldMapping(
            "activation", ("hidden_act",), _GELU, {_GELU: "gelu_tanh", **PLAIN_ACTIVATIONS}
        ),
        same("attention_dropout", "attention_dropout", 0.0),
        same("norm_eps", "layer_norm_eps", 1e-6),
    ],
    computed=[
        image_sizes(16, square=True),
        ComputedFields(
            keys=["vision_use_head"],
            read=_read_pool,
            write=lambda config: {"vision_use_head": config.pool == "map"},
        ),
    ],
    fills={"bias": True},
    tensors=lambda config: _tensors("", config),
    # Checkpoints on the hub, and those of versions of transformers before 5.
    renamed=[(r"^vision_model\.", "")],
)


def _read_encoder(config_json: Json) -> dict[str, Any]:
    nested = config_json.get("vision_config") or {}
    if not isinstance(nested, Mapping):
        raise ValueError(f"vision_config: got {str(nested)[:60]}; expected an object")
    kind = SIGLIP_VISION.model_type
    if nested.get("model_type", kind) != kind:
        raise ValueError(f"vision_config.model_type: got {nested['model_type']}; expected {kind}")
    encoder = read_config(SIGLIP_VISION, nested)
    fields = {
        field.name: getattr(encoder, field.name)
        for field in dataclasses.fields(encoder)
        if field.init
    }
    return {**fields, "pool": "mean"}


def _write_encoder(config: ViTConfig) -> dict[str, Any]:
    found = write_config(SIGLIP_VISION, dataclasses.replace(config, n_classes=None))
    unset = {"architectures", "bos_token_id", "eos_token_id", "pad_token_id"}
    return {"vision_config": {key: value for key, value in found.items() if key not in unset}}


SIGLIP = ModelFamily(
    model_type="siglip",
    architecture="SiglipForImageClassification",
    config=ViTConfig,
    constants={},
    fields=[],
    computed=[
        ComputedFields(keys=["vision_config"], read=_read_encoder, write=_write_encoder),
        CLASSES,
    ],
    # The classifier has no text, and averages the patches: the encoder's own head is not used.
    unused_keys=["initializer_factor", "text_config"],
    fills={"bias": True},
    tensors=lambda config: _tensors("vision_model.", config),
    ignored=[r"^vision_model\.head\."],
)
