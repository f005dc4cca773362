"""ViT with the image classification head (`ViTForImageClassification`)."""

from tjx_nn.hf.families.encoders.images import CLASSES, image_sizes, patch_kernel
from tjx_nn.hf.family import (
    PLAIN_ACTIVATIONS,
    FieldMapping,
    ModelFamily,
    TensorMapping,
    leading_axes,
    linear,
    norm,
    same,
    tensor,
)
from tjx_nn.models.vit_config import ViTConfig

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
    return [*tensor("patch.kernel", f"{_PATCHES}.weight", patch_kernel(config)), *_TENSORS]


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
        "n_registers": 0,
        "mask_token": False,
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
    computed=[image_sizes(16), CLASSES],
    unused_keys=["encoder_stride", "pooler_act", "pooler_output_size"],
    fills={"bias": True},
    tensors=_tensors,
    # The pooler, which the classification head does not use.
    ignored=[r"^vit\.pooler\."],
)
