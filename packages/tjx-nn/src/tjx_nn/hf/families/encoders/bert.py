"""BERT and RoBERTa with the head of masked language modeling (`BertForMaskedLM`, ...)."""

from typing import Any

from tjx_nn.hf.family import (
    LARGEST_SIZE,
    PLAIN_ACTIVATIONS,
    ComputedFields,
    FieldMapping,
    Json,
    ModelFamily,
    TensorMapping,
    linear,
    norm,
    offset_rows,
    same,
    tensor,
)
from tjx_nn.models.bert_config import BertConfig


def _write_types(config: BertConfig) -> dict[str, Any]:
    # transformers requires at least one token type.
    return {"type_vocab_size": max(1, config.n_token_types)}


def _encoder(prefix: str) -> list[TensorMapping]:
    layer, tables = f"{prefix}.encoder.layer.{{layer}}", f"{prefix}.embeddings"
    return [
        *tensor("wte.embedding", f"{tables}.word_embeddings.weight"),
        *tensor("wtt.embedding", f"{tables}.token_type_embeddings.weight"),
        *norm("ln_e", f"{tables}.LayerNorm"),
        *linear("encoder.blocks.attention.query", f"{layer}.attention.self.query"),
        *linear("encoder.blocks.attention.key", f"{layer}.attention.self.key"),
        *linear("encoder.blocks.attention.value", f"{layer}.attention.self.value"),
        *linear("encoder.blocks.attention.out", f"{layer}.attention.output.dense"),
        *norm("encoder.blocks.ln_1", f"{layer}.attention.output.LayerNorm"),
        *linear("encoder.blocks.mlp.up", f"{layer}.intermediate.dense"),
        *linear("encoder.blocks.mlp.down", f"{layer}.output.dense"),
        *norm("encoder.blocks.ln_2", f"{layer}.output.LayerNorm"),
    ]


_HEAD = "cls.predictions"
_TENSORS = [
    *_encoder("bert"),
    *tensor("wpe.embedding", "bert.embeddings.position_embeddings.weight"),
    *linear("head.dense", f"{_HEAD}.transform.dense"),
    *norm("head.norm", f"{_HEAD}.transform.LayerNorm"),
    *tensor("head.bias", f"{_HEAD}.bias"),
]
_CONSTANTS: dict[str, Any] = {
    "positions": "learned",
    "norm": "layernorm",
    "norm_position": "post",
    "bias": True,
    "n_classes": None,
}
_FIELDS = [
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
]
_FEATURES = {"is_decoder": False, "add_cross_attention": False, "tie_word_embeddings": True}
_WRITE_TYPES = ComputedFields(write=_write_types)

BERT = ModelFamily(
    model_type="bert",
    architecture="BertForMaskedLM",
    config=BertConfig,
    constants=_CONSTANTS,
    fields=[
        *_FIELDS,
        same("vocab_size", "vocab_size", 30522),
        same("max_seq_len", "max_position_embeddings", 512),
        same("pad_id", "pad_token_id", 0),
    ],
    computed=[_WRITE_TYPES],
    features=_FEATURES,
    legacy={"position_embedding_type": "absolute"},
    unused_keys=[
        "directionality",
        "pooler_fc_size",
        "pooler_num_attention_heads",
        "pooler_num_fc_layers",
        "pooler_size_per_head",
        "pooler_type",
    ],
    fills={"bias": True, "logit_bias": True},
    tensors=lambda _: _TENSORS,
    tied={
        f"{_HEAD}.decoder.weight": "bert.embeddings.word_embeddings.weight",
        f"{_HEAD}.decoder.bias": f"{_HEAD}.bias",
    },
    # Heads of other tasks in the checkpoints of Google on the hub, and a constant buffer.
    ignored=[r"^bert\.pooler\.", r"^cls\.seq_relationship\.", r"\.position_ids$"],
    renamed=[(r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")],
)


def _read_positions(config_json: Json) -> dict[str, Any]:
    # The positions of RoBERTa start after the padding id: the first rows of the table are unused.
    rows, pad_id = config_json.get("max_position_embeddings", 512), config_json["pad_token_id"]
    if type(rows) is not int or not pad_id + 1 < rows <= LARGEST_SIZE:
        raise ValueError(
            f"max_position_embeddings: got {rows!r}; expected an integer above pad_token_id + 1"
        )
    return {"max_seq_len": rows - pad_id - 1}


def _roberta_tensors(config: BertConfig) -> list[TensorMapping]:
    rows = "roberta.embeddings.position_embeddings.weight"
    return [
        *_encoder("roberta"),
        *tensor("wpe.embedding", rows, offset_rows(config.pad_id + 1)),
        *linear("head.dense", "lm_head.dense"),
        *norm("head.norm", "lm_head.layer_norm"),
        *tensor("head.bias", "lm_head.bias"),
    ]


ROBERTA = ModelFamily(
    model_type="roberta",
    architecture="RobertaForMaskedLM",
    config=BertConfig,
    constants=_CONSTANTS,
    fields=[
        *_FIELDS,
        same("vocab_size", "vocab_size", 50265),
        same("pad_id", "pad_token_id", 1),
    ],
    computed=[
        _WRITE_TYPES,
        ComputedFields(
            keys=["max_position_embeddings"],
            read=_read_positions,
            write=lambda config: {
                "max_position_embeddings": config.max_seq_len + config.pad_id + 1
            },
        ),
    ],
    features=_FEATURES,
    legacy={"position_embedding_type": "absolute"},
    fills={"bias": True, "logit_bias": True},
    tensors=_roberta_tensors,
    tied={
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    ignored=[r"^roberta\.pooler\.", r"\.position_ids$"],
)
