"""DINOv2, with and without registers: `Dinov2ForImageClassification`, `Dinov2Model`, ..."""

from typing import Any

from tjx_nn.hf.families.encoders.images import CLASSES, image_sizes, patch_kernel
from tjx_nn.hf.family import (
    LARGEST_SIZE,
    PLAIN_ACTIVATIONS,
    ComputedFields,
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


def _read_mlp(config_json: Json) -> dict[str, Any]:
    # hidden_act has no effect with SwiGLU, whose hidden layer has two thirds of the features.
    ratio, swiglu = config_json.get("mlp_ratio", 4), config_json.get("use_swiglu_ffn", False)
    if type(ratio) is not int or not 0 < ratio <= LARGEST_SIZE:
        raise ValueError(f"mlp_ratio: got {ratio!r}; expected a positive integer")
    if type(swiglu) is not bool:
        raise ValueError(f"use_swiglu_ffn: got {swiglu!r}; expected a boolean")
    features = config_json["hidden_size"] * ratio
    if swiglu:
        return {"activation": "swiglu", "d_ff": (int(features * 2 / 3) + 7) // 8 * 8}
    name = config_json.get("hidden_act", "gelu")
    if not isinstance(name, str) or name not in PLAIN_ACTIVATIONS:
        raise ValueError(f"hidden_act: got {name!r}; expected one of {list(PLAIN_ACTIVATIONS)}")
    return {"activation": PLAIN_ACTIVATIONS[name], "d_ff": features}


def _write_mlp(config: ViTConfig) -> dict[str, Any]:
    swiglu = config.activation == "swiglu"
    names = [name for name, form in PLAIN_ACTIVATIONS.items() if form == config.activation]
    ratio = config.ff_dim / config.d_model * (1.5 if swiglu else 1)
    return {
        "mlp_ratio": max(1, round(ratio)),
        "use_swiglu_ffn": swiglu,
        "hidden_act": [*names, "gelu"][0],
    }


def _tensors(prefix: str, config: ViTConfig) -> list[TensorMapping]:
    tables, layer = f"{prefix}embeddings", f"{prefix}encoder.layer.{{layer}}"
    patches = f"{tables}.patch_embeddings.projection"
    mlp = [
        *linear("encoder.blocks.mlp.up", f"{layer}.mlp.fc1"),
        *linear("encoder.blocks.mlp.down", f"{layer}.mlp.fc2"),
    ]
    if config.gated:
        up = ("encoder.blocks.mlp.gate", "encoder.blocks.mlp.up")
        kernels, biases = (tuple(f"{name}.{leaf}" for name in up) for leaf in ("kernel", "bias"))
        sizes = [config.ff_dim] * 2
        mlp = [
            TensorMapping(kernels, f"{layer}.mlp.weights_in.weight", fused_linear(sizes)),
            TensorMapping(biases, f"{layer}.mlp.weights_in.bias", concatenated(2)),
            *linear("encoder.blocks.mlp.down", f"{layer}.mlp.weights_out"),
        ]
    return [
        *tensor("patch.kernel", f"{patches}.weight", patch_kernel(config)),
        *tensor("patch.bias", f"{patches}.bias"),
        *tensor("cls", f"{tables}.cls_token", leading_axes(2)),
        *tensor("mask_token", f"{tables}.mask_token", leading_axes(1)),
        *tensor("registers", f"{tables}.register_tokens", leading_axes(1)),
        *tensor("wpe.embedding", f"{tables}.position_embeddings", leading_axes(1)),
        *norm("encoder.blocks.ln_1", f"{layer}.norm1"),
        *linear("encoder.blocks.attention.query", f"{layer}.attention.attention.query"),
        *linear("encoder.blocks.attention.key", f"{layer}.attention.attention.key"),
        *linear("encoder.blocks.attention.value", f"{layer}.attention.attention.value"),
        *linear("encoder.blocks.attention.out", f"{layer}.attention.output.dense"),
        *tensor("encoder.blocks.scale_1", f"{layer}.layer_scale1.lambda1"),
        *norm("encoder.blocks.ln_2", f"{layer}.norm2"),
        *mlp,
        *tensor("encoder.blocks.scale_2", f"{layer}.layer_scale2.lambda1"),
        *norm("encoder.ln_f", f"{prefix}layernorm"),
        *linear("head", "classifier"),
    ]


def _family(model_type: str, name: str, *, registers: bool, classes: bool) -> ModelFamily:
    """Describe the classifier, or the model without a head that pools by its class token."""
    kind = "ForImageClassification" if classes else "Model"
    prefix = f"{model_type}." if classes else ""
    constants: dict[str, Any] = {
        "positions": "learned",
        "norm": "layernorm",
        "norm_position": "pre",
        "bias": True,
        "pool": "class_mean" if classes else "class",
    }
    # A model with registers always has a mask token.
    constants |= {"mask_token": True} if registers else {"n_registers": 0}
    constants |= {} if classes else {"n_classes": None}
    own = (
        same("n_registers", "num_register_tokens", 4)
        if registers
        else same("mask_token", "use_mask_token", True)
    )
    # transformers interpolates the positions of images that are not square.
    sizes = image_sizes(16 if registers else 14, square=True)
    mlp = ComputedFields(
        keys=["mlp_ratio", "use_swiglu_ffn", "hidden_act"], read=_read_mlp, write=_write_mlp
    )
    return ModelFamily(
        model_type=model_type,
        architecture=f"{name}{kind}",
        config=ViTConfig,
        constants=constants,
        fields=[
            same("channels", "num_channels", 3),
            same("d_model", "hidden_size", 768),
            same("n_layer", "num_hidden_layers", 12),
            same("n_head", "num_attention_heads", 12),
            same("qkv_bias", "qkv_bias", True),
            same("layer_scale", "layerscale_value", 1.0),
            same("embedding_dropout", "hidden_dropout_prob", 0.0),
            same("attention_dropout", "attention_probs_dropout_prob", 0.0),
            same("norm_eps", "layer_norm_eps", 1e-6),
            same("init_std", "initializer_range", 0.02),
            own,
        ],
        computed=[sizes, mlp, *([CLASSES] if classes else [])],
        features={"drop_path_rate": 0.0},
        # Feature maps of the backbone for other models.
        unused_keys=[
            "apply_layernorm", "out_features", "out_indices", "reshape_hidden_states",
            "stage_names",
        ],
        fills={"bias": True},
        tensors=lambda config: _tensors(prefix, config),
    )  # fmt: skip


_PLAIN: dict[str, Any] = {"model_type": "dinov2", "name": "Dinov2", "registers": False}
_REGISTERS: dict[str, Any] = {
    "model_type": "dinov2_with_registers", "name": "Dinov2WithRegisters", "registers": True,
}  # fmt: skip
DINOV2 = _family(**_PLAIN, classes=True)
DINOV2_BACKBONE = _family(**_PLAIN, classes=False)
DINOV2_REGISTERS = _family(**_REGISTERS, classes=True)
DINOV2_REGISTERS_BACKBONE = _family(**_REGISTERS, classes=False)
