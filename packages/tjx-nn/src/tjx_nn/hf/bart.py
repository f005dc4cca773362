"""The encoder-decoder as BART has it: `BartForConditionalGeneration`."""

from tjx_nn.hf.family import (
    PLAIN_ACTIVATIONS,
    FieldMapping,
    ModelFamily,
    TensorMapping,
    after_rows,
    leading_axes,
    linear,
    norm,
    same,
    tensor,
)
from tjx_nn.models.encoder_decoder_config import EncoderDecoderConfig


def _attention(ours: str, theirs: str) -> list[TensorMapping]:
    return [
        *linear(f"{ours}.query", f"{theirs}.q_proj"),
        *linear(f"{ours}.key", f"{theirs}.k_proj"),
        *linear(f"{ours}.value", f"{theirs}.v_proj"),
        *linear(f"{ours}.out", f"{theirs}.out_proj"),
    ]


def _block(ours: str, theirs: str) -> list[TensorMapping]:
    return [
        *_attention(f"{ours}.attention", f"{theirs}.self_attn"),
        *norm(f"{ours}.ln_1", f"{theirs}.self_attn_layer_norm"),
        *linear(f"{ours}.mlp.up", f"{theirs}.fc1"),
        *linear(f"{ours}.mlp.down", f"{theirs}.fc2"),
        *norm(f"{ours}.ln_2", f"{theirs}.final_layer_norm"),
    ]


# BART counts positions from 2: the first two rows of its tables are never read.
_POSITIONS = after_rows(2)
_ENCODER, _DECODER = "model.encoder", "model.decoder"
_ROWS = [
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
    # Dropout inside the MLP and of whole layers, which we do not have, only matter for training.
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
    fills={"bias": True, "logit_bias": True},
    rows=lambda _: _ROWS,
    tied=dict.fromkeys(
        [f"{_ENCODER}.embed_tokens.weight", f"{_DECODER}.embed_tokens.weight", "lm_head.weight"],
        "model.shared.weight",
    ),
    ignored=[r"^model\.(en|de)coder\.version$"],
)
