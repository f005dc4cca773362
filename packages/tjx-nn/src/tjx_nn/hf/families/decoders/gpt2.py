"""GPT-2 (`GPT2LMHeadModel`): Conv1D kernels [in, out] and fused query, key and value."""

from tjx_nn.hf.family import (
    PLAIN_ACTIVATIONS,
    FieldMapping,
    ModelFamily,
    TensorMapping,
    concatenated,
    norm,
    same,
    tensor,
)
from tjx_nn.models.gpt_config import GPTConfig

_QKV = tuple(f"blocks.attention.{name}" for name in ("query", "key", "value"))


def _conv1d(param: str, tensor_name: str) -> list[TensorMapping]:
    return [
        *tensor(f"{param}.kernel", f"{tensor_name}.weight"),
        *tensor(f"{param}.bias", f"{tensor_name}.bias"),
    ]


_BLOCK = "transformer.h.{layer}"
_TENSORS = [
    *tensor("wte.embedding", "transformer.wte.weight"),
    *tensor("wpe.embedding", "transformer.wpe.weight"),
    *norm("blocks.ln_1", f"{_BLOCK}.ln_1"),
    TensorMapping(
        tuple(f"{p}.kernel" for p in _QKV), f"{_BLOCK}.attn.c_attn.weight", concatenated(3)
    ),
    TensorMapping(tuple(f"{p}.bias" for p in _QKV), f"{_BLOCK}.attn.c_attn.bias", concatenated(3)),
    *_conv1d("blocks.attention.out", f"{_BLOCK}.attn.c_proj"),
    *norm("blocks.ln_2", f"{_BLOCK}.ln_2"),
    *_conv1d("blocks.mlp.up", f"{_BLOCK}.mlp.c_fc"),
    *_conv1d("blocks.mlp.down", f"{_BLOCK}.mlp.c_proj"),
    *norm("ln_f", "transformer.ln_f"),
    *tensor("head.embedding", "lm_head.weight"),
]

GPT2 = ModelFamily(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    config=GPTConfig,
    constants={"positions": "learned", "norm": "layernorm", "bias": True},
    fields=[
        same("vocab_size", "vocab_size", 50257),
        same("max_seq_len", "n_positions", 1024),
        same("d_model", "n_embd", 768),
        same("n_layer", "n_layer", 12),
        same("n_head", "n_head", 12),
        same("d_ff", "n_inner", None),
        FieldMapping("activation", ("activation_function",), "gelu_new", PLAIN_ACTIVATIONS),
        same("dropout", "resid_pdrop", 0.1),
        same("embedding_dropout", "embd_pdrop", 0.1),
        same("attention_dropout", "attn_pdrop", 0.1),
        same("norm_eps", "layer_norm_epsilon", 1e-5),
        same("init_std", "initializer_range", 0.02),
        same("tied_head", "tie_word_embeddings", True),
    ],
    features={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    legacy={"reorder_and_upcast_attn": False},
    unused_keys=[
        "n_ctx",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
    ],
    fills={"bias": True, "vocab_multiple": 1},
    tensors=lambda _: _TENSORS,
    tied={"lm_head.weight": "transformer.wte.weight"},
    # Causal masks that old transformers versions stored.
    ignored=[r"\.attn\.(masked_)?bias$"],
    # The checkpoints of OpenAI on the hub are of the model without a head.
    renamed=[(r"^(wte|wpe|h|ln_f)\.", r"transformer.\1.")],
)
