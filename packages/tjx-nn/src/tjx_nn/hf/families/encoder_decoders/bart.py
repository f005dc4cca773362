"""BART (`BartForConditionalGeneration`), an encoder-decoder."""

from tjx_nn.hf.family import (
    PLAIN_ACTIVATIONS,
    FieldMapping,
    ModelFamily,
    TensorMapping,
    leading_axes,
    linear,
    norm,
    offset_rows,
    same,
    tensor,
)
from tjx_nn.models.encoder_decoder_config import EncoderDecoderConfig


def _attention(param: str, tensor_name: str) -> list[TensorMapping]:
    return [
        *linear(f"{param}.query", f"{tensor_name}.q_proj"),
        *linear(f"{param}.key", f"{tensor_name}.k_proj"),
        *linear(f"{param}.value", f"{tensor_name}.v_proj"),
        *linear(f"{param}.out", f"{tensor_name}.out_proj"),
    ]


def _block(param: str, tensor_name: str) -> list[TensorMapping]:
    return [
        *_attention(f"{param}.attention", f"{tensor_name}.self_attn"),
        *norm(f"{param}.ln_1", f"{tensor_name}.self_attn_layer_norm"),
        *linear(f"{param}.mlp.up", f"{tensor_name}.fc1"),
        *linear(f"{param}.mlp.down", f"{tensor_name}.fc2"),
        *norm(f"{param}.ln_2", f"{tensor_name}.final_layer_norm"),
    ]


# Positions of BART start at 2: the first two rows of its position tables are unused.
_POSITIONS = offset_rows(2)
_ENCODER, _DECODER = "model.encoder", "model.decoder"
_TENSORS = [
    *tensor("wte.embedding", "model.shared.weight"),
    *tensor("encoder_wpe.embedding", f"{_ENCODER}.embed_positions.weight", _POSITIONS),
    *norm("encoder_ln_e", f"{_ENCODER}.layernorm_embedding"),
    *_block("encoder.blocks", f"{_ENCODER}.layers.{{layer}}"),
    *tensor("wpe.embedding", f"{_DECODER}.embed_positions.weight", _POSITIONS),
    *norm("ln_e", f"{_DECODER}.layernorm_embedding"),
    *_block("decoder.blocks", f"{_DECODER}.layers.{{layer}}"),
    *_attention("decoder.blocks.cross", f"{_DECODER}.layers.{{layer}}.encoder_attn"),
    *norm("decoder.blocks.ln_cross", f"{_DECODER}.layers.{{layer}}.encoder_attn_layer_norm"),
    *tensor("head_bias", "final_logits_bias", leading_axes(1)),
]

BART = ModelFamily(
    model_type="bart",
    architecture="BartForConditionalGeneration",
    config=EncoderDecoderConfig,
    constants={
        "positions": "learned",
        "norm": "layernorm",
        "norm_position": "post",
        "norm_eps": 1e-5,
        "bias": True,
        "embedding_norm": True,
        "tied_head": True,
        "logit_bias": True,
    },
    # activation_dropout and layerdrop have no tjx field; they affect only training.
    fields=[
        same("vocab_size", "vocab_size", 50265),
        same("max_seq_len", "max_position_embeddings", 1024),
        same("d_model", "d_model", 1024),
        same("n_encoder_layer", "encoder_layers", 12),
        same("n_layer", "decoder_layers", 12),
        FieldMapping("n_head", ("encoder_attention_heads", "decoder_attention_heads"), 16),
        FieldMapping("d_ff", ("encoder_ffn_dim", "decoder_ffn_dim"), 4096),
        FieldMapping("activation", ("activation_function",), "gelu", PLAIN_ACTIVATIONS),
        same("scale_embeddings", "scale_embedding", False),
        same("dropout", "dropout", 0.1),
        same("attention_dropout", "attention_dropout", 0.0),
        same("init_std", "init_std", 0.02),
        same("pad_id", "pad_token_id", 1),
        same("start_id", "decoder_start_token_id", 2),
        same("stop_id", "eos_token_id", 2),
    ],
    features={"tie_word_embeddings": True},
    legacy={
        "add_bias_logits": False,
        "add_final_layer_norm": False,
        "do_blenderbot_90_layernorm": False,
        "extra_pos_embeddings": 2,
        "is_decoder": False,
        "normalize_before": False,
        "normalize_embedding": True,
        "static_position_embeddings": False,
    },
    unused_keys=[
        "activation_dropout",
        "classif_dropout",
        "decoder_layerdrop",
        "encoder_layerdrop",
        "force_bos_token_to_be_generated",
        "num_hidden_layers",
    ],
    fills={"bias": True, "logit_bias": True},
    tensors=lambda _: _TENSORS,
    tied=dict.fromkeys(
        [f"{_ENCODER}.embed_tokens.weight", f"{_DECODER}.embed_tokens.weight", "lm_head.weight"],
        "model.shared.weight",
    ),
    ignored=[r"^model\.(en|de)coder\.version$"],
)
