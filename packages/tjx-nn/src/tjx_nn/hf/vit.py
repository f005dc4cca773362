"""ViT with its head for classes: `ViTForImageClassification`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tjx_nn.hf.family import (
    LARGEST_SIZE,
    PLAIN_ACTIVATIONS,
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


def _read_sizes(theirs: Json) -> dict[str, Any]:
    """Return sizes, which are one number or two, and the number of classes, which are all named."""
    height_width, patch = _pair(theirs, "image_size", 224), _pair(theirs, "patch_size", 16)
    if patch[0] != patch[1]:
        raise ValueError(f"patch_size is {list(patch)}: only squares can be read")
    names = theirs.get("id2label") or {}
    if not isinstance(names, Mapping):
        raise ValueError("id2label should hold the classes' names by their numbers")
    classes = len(names) or theirs.get("num_labels", 2)
    return {"image_size": height_width, "patch_size": patch[0], "n_classes": classes}


def _pair(theirs: Json, key: str, default: int) -> tuple[int, int]:
    size = theirs.get(key, default)
    match [size, size] if isinstance(size, int) else size:
        case [int(first), int(second)] if max(first, second) <= LARGEST_SIZE:
            return first, second
    raise ValueError(f"{key} is {size!r}: only one whole number or two can be read")


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
    """Lay out the patches' kernel as a convolution's: [out, channel, row, column]."""
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
_ROWS = [
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


def _rows(config: ViTConfig) -> list[TensorMapping]:
    return [*tensor("patch.kernel", f"{_PATCHES}.weight", _convolution(config)), *_ROWS]


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
    read_extra=_read_sizes,
    write_extra=_write_sizes,
    fills={"bias": True},
    rows=_rows,
    # A head of other tasks.
    ignored=[r"^vit\.pooler\."],
)
