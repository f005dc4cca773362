"""BERT with the masked-language-model head (`BertForMaskedLM`)."""

from typing import Any

from tjx_nn.hf.family import (
    PLAIN_ACTIVATIONS,
    FieldMapping,
    ModelFamily,
    linear,
    norm,
    same,
    tensor,
)
from tjx_nn.models.bert_config import BertConfig


def _write_types(config: BertConfig) -> dict[str, Any]:
    # transformers requires at least one token type.
    return {"type_vocab_size": max(1, config.n_token_types)}


_LAYER = "bert.encoder.layer.{layer}"
_TABLES = "bert.embeddings"
_HEAD = "cls.predictions"
_TENSORS = [
    *tensor("wte.embedding", f"{_TABLES}.word_embeddings.weight"),
    *tensor("wpe.embedding", f"{_TABLES}.position_embeddings.weight"),
    *tensor("wtt.embedding", f"{_TABLES}.token_type_embeddings.weight"),
    *norm("ln_e", f"{_TABLES}.LayerNorm"),
    *linear("encoder.blocks.attention.query", f"{_LAYER}.attention.self.query"),
    *linear("encoder.blocks.attention.key", f"{_LAYER}.attention.self.key"),
    *linear("encoder.blocks.attention.value", f"{_LAYER}.attention.self.value"),
    *linear("encoder.blocks.attention.out", f"{_LAYER}.attention.output.dense"),
    *norm("encoder.blocks.ln_1", f"{_LAYER}.attention.output.LayerNorm"),
    *linear("encoder.blocks.mlp.up", f"{_LAYER}.intermediate.dense"),
    *linear("encoder.blocks.mlp.down", f"{_LAYER}.output.dense"),
    *norm("encoder.blocks.ln_2", f"{_LAYER}.output.LayerNorm"),
    *linear("head.dense", f"{_HEAD}.transform.dense"),
    *norm("head.norm", f"{_HEAD}.transform.LayerNorm"),
    *tensor("head.bias", f"{_HEAD}.bias"),
]

BERT = ModelFamily(
    model_type="bert",
    architecture="BertForMaskedLM",
    config=BertConfig,
    constants={
        "positions": "learned",
        "norm": "layernorm",
        "norm_position": "post",
        "bias": True,
        "n_classes": None,
    },
    fields=[
        same("vocab_size", "vocab_size", 30522),
        same("max_seq_len", "max_position_embeddings", 512),
        same("d_model", "hidden_size", 768),
        same("n_layer", "num_hidden_layers", 12),
        same("n_head", "num_attention_heads", 12),
        same("d_ff", "intermediate_size", 3072),
        same("n_token_types", "type_vocab_size", 2),
        FieldMapping("activation", ("hidden_act",), "gelu", PLAIN_ACTIVATIONS),
        same("dropout", "hidden_dropout_prob", 0.1),
        same("attention_dropout", "attention_probs_dropout_prob", 0.1),
        same("norm_eps", "layer_norm_eps", 1e-12),
        same("init_std", "initializer_range", 0.02),
        same("pad_id", "pad_token_id", 0),
    ],
    features={
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    write_extra=_write_types,
    fills={"bias": True},
    tensors=lambda _: _TENSORS,
    tied={
        f"{_HEAD}.decoder.weight": f"{_TABLES}.word_embeddings.weight",
        f"{_HEAD}.decoder.bias": f"{_HEAD}.bias",
    },
    # Heads of other tasks in the checkpoints of Google on the hub, and a constant buffer.
    ignored=[r"^bert\.pooler\.", r"^cls\.seq_relationship\.", r"\.position_ids$"],
    renamed=[(r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")],
)
