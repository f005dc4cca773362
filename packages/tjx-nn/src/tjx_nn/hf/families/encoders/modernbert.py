"""ModernBERT (`ModernBertForMaskedLM`): an encoder with rotary embeddings and local attention."""

from collections.abc import Sequence
from typing import Any

from tjx_nn.hf.family import (
    ComputedFields,
    FieldMapping,
    Json,
    ModelFamily,
    TensorMapping,
    concatenated,
    fused_linear,
    linear,
    norm,
    same,
    tensor,
)
from tjx_nn.hf.layer_types import layer_windows
from tjx_nn.hf.rope import dual_rope
from tjx_nn.models.bert_config import BertConfig

_WINDOWS = layer_windows(
    lambda json, layer: layer % json.get("global_attn_every_n_layers", 3) == 0,
    keys=["global_attn_every_n_layers"],
    global_first=True,
)
_ROPE = dual_rope(
    base=160000.0,
    local_base=10000.0,
    local_key="local_rope_theta",
    keys=["rope_parameters", "global_rope_theta"],
)


def _read_windows(config_json: Json) -> dict[str, Any]:
    # local_attention counts tokens on both sides, of which transformers rounds half down.
    width = config_json.get("local_attention", 128)
    if type(width) is not int or width < 2:
        raise ValueError(f"local_attention: got {width!r}; expected an integer of at least 2")
    found = _WINDOWS.read({**config_json, "sliding_window": width // 2 + 1})
    return {**found, "symmetric_window": found["window"] is not None}


def _write_windows(config: BertConfig) -> dict[str, Any]:
    found = _WINDOWS.write(config)
    window = found.pop("sliding_window")
    return found if window is None else {**found, "local_attention": 2 * (window - 1)}


def _read_rope(config_json: Json) -> dict[str, Any]:
    return _ROPE.read({**config_json, "rope_theta": config_json.get("global_rope_theta")})


def _fused(params: Sequence[str], name: str, size: int) -> list[TensorMapping]:
    """Map linear layers of `size` outputs each that transformers stores as one."""
    kernels, biases = (tuple(f"{each}.{leaf}" for each in params) for leaf in ("kernel", "bias"))
    return [
        TensorMapping(kernels, f"{name}.weight", fused_linear([size] * len(params))),
        TensorMapping(biases, f"{name}.bias", concatenated(len(params))),
    ]


def _blocks(stack: str, config: BertConfig) -> list[TensorMapping]:
    layer = "model.layers.{layer}"
    qkv = [f"{stack}.attention.{name}" for name in ("query", "key", "value")]
    gate_up = [f"{stack}.mlp.{name}" for name in ("gate", "up")]
    return [
        *norm(f"{stack}.ln_1", f"{layer}.attn_norm"),
        *_fused(qkv, f"{layer}.attn.Wqkv", config.n_head * config.head_dim),
        *linear(f"{stack}.attention.out", f"{layer}.attn.Wo"),
        *norm(f"{stack}.ln_2", f"{layer}.mlp_norm"),
        *_fused(gate_up, f"{layer}.mlp.Wi", config.ff_dim),
        *linear(f"{stack}.mlp.down", f"{layer}.mlp.Wo"),
    ]


def _tensors(config: BertConfig) -> list[TensorMapping]:
    return [
        *tensor("wte.embedding", "model.embeddings.tok_embeddings.weight"),
        *norm("ln_e", "model.embeddings.norm"),
        *_blocks("encoder.dense_blocks", config),
        *_blocks("encoder.blocks", config),
        *norm("encoder.ln_f", "model.final_norm"),
        *linear("head.dense", "head.dense"),
        *norm("head.norm", "head.norm"),
        *tensor("head.bias", "decoder.bias"),
    ]


MODERNBERT = ModelFamily(
    model_type="modernbert",
    architecture="ModernBertForMaskedLM",
    config=BertConfig,
    constants={
        "positions": "rope",
        "norm": "layernorm",
        "norm_position": "pre",
        "first_norm": False,
        "n_token_types": 0,
        "n_classes": None,
    },
    fields=[
        same("vocab_size", "vocab_size", 50368),
        same("max_seq_len", "max_position_embeddings", 8192),
        same("d_model", "hidden_size", 768),
        same("n_layer", "num_hidden_layers", 22),
        same("n_head", "num_attention_heads", 12),
        same("d_ff", "intermediate_size", 1152),
        FieldMapping(
            "activation",
            ("hidden_activation", "classifier_activation"),
            "gelu",
            {"gelu": "geglu_erf", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu",
             "silu": "swiglu"},
        ),
        FieldMapping(
            "bias", ("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"), False
        ),
        same("logit_bias", "decoder_bias", True),
        same("norm_eps", "norm_eps", 1e-5),
        same("embedding_dropout", "embedding_dropout", 0.0),
        same("attention_dropout", "attention_dropout", 0.0),
        same("init_std", "initializer_range", 0.02),
        same("pad_id", "pad_token_id", 50283),
    ],
    computed=[
        # Special tokens belong to the tokenizer.
        ComputedFields(write=lambda _: {"cls_token_id": None, "sep_token_id": None}),
        ComputedFields(keys=_ROPE.keys, read=_read_rope, write=_ROPE.write),
        ComputedFields(
            keys=["local_attention", "layer_types", "global_attn_every_n_layers"],
            read=_read_windows,
            write=_write_windows,
        ),
    ],
    features={"tie_word_embeddings": True},
    legacy={"rope_scaling": None},
    # Dropout inside of the MLP, initial values, kernels, other heads, and the form of the loss.
    unused_keys=[
        "classifier_pooling", "deterministic_flash_attn", "initializer_cutoff_factor",
        "layer_norm_eps", "mlp_dropout", "position_embedding_type", "reference_compile",
        "repad_logits_with_grad", "sparse_pred_ignore_index", "sparse_prediction",
    ],
    tensors=_tensors,
    tied={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
)  # fmt: skip
