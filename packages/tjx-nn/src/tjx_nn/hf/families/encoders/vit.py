"""ViT with the image classification head (`ViTForImageClassification`)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tjx_nn.hf.family import (
    LARGEST_SIZE,
    PLAIN_ACTIVATIONS,
    ComputedFields,
    FieldMapping,
    Json,
    ModelFamily,
    TensorMapping,
    TensorTransform,
    leading_axes,
    linear,
    norm,
    same,
    tensor,
)
from tjx_nn.models.vit_config import ViTConfig


def _read_sizes(config_json: Json) -> dict[str, Any]:
    """Read the image and patch size (one number or a pair) and the number of classes."""
    height_width, patch = (
        _pair(config_json, "image_size", 224),
        _pair(config_json, "patch_size", 16),
    )
    if patch[0] != patch[1]:
        raise ValueError(f"patch_size: got {list(patch)}; expected a square patch")
    names = config_json.get("id2label") or {}
    if not isinstance(names, Mapping):
        raise ValueError(f"id2label: got {str(names)[:60]}; expected an object of class names")
    classes = len(names) or config_json.get("num_labels", 2)
    return {"image_size": height_width, "patch_size": patch[0], "n_classes": classes}


def _pair(config_json: Json, key: str, default: int) -> tuple[int, int]:
    size = config_json.get(key, default)
    match [size, size] if isinstance(size, int) else size:
        case [int(first), int(second)] if max(first, second) <= LARGEST_SIZE:
            return first, second
    raise ValueError(f"{key}: got {size!r}; expected one or two integers up to {LARGEST_SIZE}")


def _write_sizes(config: ViTConfig) -> dict[str, Any]:
    height, width = config.height_width
    names = [f"LABEL_{index}" for index in range(config.n_classes)]
    return {
        "image_size": height if height == width else [height, width],
        "patch_size": config.patch_size,
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
    }


def _convolution(config: ViTConfig) -> TensorTransform:
    """Convert the patch kernel to that of a convolution, [out, channel, row, column]."""
    sides = (config.patch_size, config.patch_size, config.channels)

    def read(x: np.ndarray) -> list[np.ndarray]:
        return [x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])]

    def write(parts: Sequence[np.ndarray]) -> np.ndarray:
        (x,) = parts
        return x.reshape(*sides, x.shape[1]).transpose(3, 2, 0, 1)

    side, _, channels = sides
    return TensorTransform(read, write, lambda shapes: (shapes[0][1], channels, side, side))


_LAYER = "vit.encoder.layer.{layer}"
_PATCHES = "vit.embeddings.patch_embeddings.projection"
_TENSORS = [
    *tensor("patch.bias", f"{_PATCHES}.bias"),
    *tensor("cls", "vit.embeddings.cls_token", leading_axes(2)),
    *tensor("wpe.embedding", "vit.embeddings.position_embeddings", leading_axes(1)),
    *norm("encoder.blocks.ln_1", f"{_LAYER}.layernorm_before"),
    *linear("encoder.blocks.attention.query", f"{_LAYER}.attention.attention.query"),
    *linear("encoder.blocks.attention.key", f"{_LAYER}.attention.attention.key"),
    *linear("encoder.blocks.attention.value", f"{_LAYER}.attention.attention.value"),
    *linear("encoder.blocks.attention.out", f"{_LAYER}.attention.output.dense"),
    *norm("encoder.blocks.ln_2", f"{_LAYER}.layernorm_after"),
    *linear("encoder.blocks.mlp.up", f"{_LAYER}.intermediate.dense"),
    *linear("encoder.blocks.mlp.down", f"{_LAYER}.output.dense"),
    *norm("encoder.ln_f", "vit.layernorm"),
    *linear("head", "classifier"),
]


def _tensors(config: ViTConfig) -> list[TensorMapping]:
    return [*tensor("patch.kernel", f"{_PATCHES}.weight", _convolution(config)), *_TENSORS]


VIT = ModelFamily(
    model_type="vit",
    architecture="ViTForImageClassification",
    config=ViTConfig,
    constants={
        "positions": "learned",
        "norm": "layernorm",
        "norm_position": "pre",
        "bias": True,
        "pool": "class",
    },
    fields=[
        same("channels", "num_channels", 3),
        same("d_model", "hidden_size", 768),
        same("n_layer", "num_hidden_layers", 12),
        same("n_head", "num_attention_heads", 12),
        same("d_ff", "intermediate_size", 3072),
        FieldMapping("activation", ("hidden_act",), "gelu", PLAIN_ACTIVATIONS),
        same("dropout", "hidden_dropout_prob", 0.0),
        same("attention_dropout", "attention_probs_dropout_prob", 0.0),
        same("norm_eps", "layer_norm_eps", 1e-12),
        same("init_std", "initializer_range", 0.02),
    ],
    features={"qkv_bias": True},
    computed=[
        ComputedFields(
            keys=["image_size", "patch_size", "id2label", "num_labels"],
            read=_read_sizes,
            write=_write_sizes,
        )
    ],
    unused_keys=["encoder_stride", "pooler_act", "pooler_output_size"],
    fills={"bias": True},
    tensors=_tensors,
    # The pooler, which the classification head does not use.
    ignored=[r"^vit\.pooler\."],
)
