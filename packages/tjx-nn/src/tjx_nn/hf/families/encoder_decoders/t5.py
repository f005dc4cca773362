"""T5, T5 v1.1 and FLAN-T5 (`T5ForConditionalGeneration`), and mT5: encoder-decoders."""

from typing import Any

from tjx_nn.hf.family import (
    MOST_LAYERS,
    ComputedFields,
    FieldMapping,
    Json,
    ModelFamily,
    TensorMapping,
    linear,
    norm,
    same,
    tensor,
)
from tjx_nn.models.encoder_decoder_config import EncoderDecoderConfig
from tjx_nn.problems import raise_problems

# tjx activation of feed_forward_proj; saving uses the first of several.
_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu_erf",
    "gelu_new": "gelu_tanh",
    "gated-gelu": "geglu",
    "gated-gelu_new": "geglu",
    "gated-silu": "swiglu",
}
_HEAD = "lm_head.weight"


def _attention(param: str, tensor_name: str) -> list[TensorMapping]:
    return [
        *linear(f"{param}.query", f"{tensor_name}.q"),
        *linear(f"{param}.key", f"{tensor_name}.k"),
        *linear(f"{param}.value", f"{tensor_name}.v"),
        *linear(f"{param}.out", f"{tensor_name}.o"),
    ]


def _stack(stack: str, bias: str, *, mlp: int, gated: bool) -> list[TensorMapping]:
    """Map encoder or decoder, whose MLP has the number `mlp` among the layers of a block."""
    blocks, layer = f"{stack}.blocks", f"{stack}.block.{{layer}}.layer"
    first, ff = f"{stack}.block.0.layer.0.SelfAttention", f"{layer}.{mlp}.DenseReluDense"
    return [
        *tensor(f"{bias}.embedding", f"{first}.relative_attention_bias.weight"),
        *_attention(f"{blocks}.attention", f"{layer}.0.SelfAttention"),
        *norm(f"{blocks}.ln_1", f"{layer}.0.layer_norm"),
        *_attention(f"{blocks}.cross", f"{layer}.1.EncDecAttention"),
        *norm(f"{blocks}.ln_cross", f"{layer}.1.layer_norm"),
        *linear(f"{blocks}.mlp.up", f"{ff}.wi_1" if gated else f"{ff}.wi"),
        *linear(f"{blocks}.mlp.gate", f"{ff}.wi_0"),
        *linear(f"{blocks}.mlp.down", f"{ff}.wo"),
        *norm(f"{blocks}.ln_2", f"{layer}.{mlp}.layer_norm"),
        *norm(f"{stack}.ln_f", f"{stack}.final_layer_norm"),
    ]


def _tensors(config: EncoderDecoderConfig) -> list[TensorMapping]:
    return [
        *tensor("wte.embedding", "shared.weight"),
        *tensor("head.embedding", _HEAD),
        *_stack("encoder", "encoder_relative_bias", mlp=1, gated=config.gated),
        *_stack("decoder", "relative_bias", mlp=2, gated=config.gated),
    ]


def _read_decoder(config_json: Json) -> dict[str, Any]:
    """Read depth and start token, and compare the copies of the activation with its name."""
    layers, start = config_json.get("num_decoder_layers"), config_json.get("decoder_start_token_id")
    layers = config_json["num_layers"] if layers is None else layers
    start = config_json["pad_token_id"] if start is None else start
    problems = [
        f"{key}: got {str(value)[:60]}; expected an integer up to {largest}"
        for key, value, largest in (
            ("num_decoder_layers", layers, MOST_LAYERS),
            ("decoder_start_token_id", start, config_json["vocab_size"] - 1),
        )
        if type(value) is not int or not 0 <= value <= largest
    ]
    name = config_json["feed_forward_proj"]
    activation = "gelu_new" if name == "gated-gelu" else name.removeprefix("gated-")
    for key, expected in (("dense_act_fn", activation), ("is_gated_act", name != activation)):
        if key in config_json and config_json[key] != expected:
            problems.append(
                f"{key}: got {str(config_json[key])[:60]} with feed_forward_proj {name!r}; "
                f"expected {expected}; correct or delete it"
            )
    raise_problems(problems)
    return {"n_layer": layers, "start_id": start}


def _write_decoder(config: EncoderDecoderConfig) -> dict[str, Any]:
    return {"num_decoder_layers": config.n_layer, "decoder_start_token_id": config.start_id}


def _read_head(config_json: Json) -> dict[str, Any]:
    # transformers 5 writes tie_word_embeddings true for every model; the head then has its own
    # tensor, or not. Earlier versions scale the output of the decoder if the head is tied.
    tied = config_json.get("tie_word_embeddings", True)
    scaled = config_json.get("scale_decoder_outputs", tied)
    if type(tied) is not bool or type(scaled) is not bool:
        raise ValueError(
            f"tie_word_embeddings, scale_decoder_outputs: got {str(tied)[:60]} and "
            f"{str(scaled)[:60]}; expected booleans"
        )
    scale = config_json["d_model"] ** -0.5 if scaled and config_json["d_model"] else 1.0
    return {"tied_head": tied and scaled, "logit_scale": scale}


def _write_head(config: EncoderDecoderConfig) -> dict[str, Any]:
    scaled = config.logit_scale != 1
    return {"tie_word_embeddings": config.tied_head, "scale_decoder_outputs": scaled}


def _family(
    model_type: str, architecture: str, defaults: dict[str, Any], **options: Any
) -> ModelFamily:
    """Describe T5 or mT5 by its default sizes and its head."""
    computed = options.pop("computed", [])
    constants = options.pop("constants", {})
    return ModelFamily(
        model_type=model_type,
        architecture=architecture,
        config=EncoderDecoderConfig,
        constants={
            "positions": "none",
            "norm": "rmsnorm",
            "norm_position": "pre",
            "bias": False,
            "scale_embeddings": False,
            "attention_scale": 1.0,
            **constants,
        },
        fields=[
            same("vocab_size", "vocab_size", defaults["vocab_size"]),
            # A key of some checkpoints. T5 has no longest sequence: this is that of its training.
            same("max_seq_len", "n_positions", 512),
            same("d_model", "d_model", 512),
            same("d_head", "d_kv", 64),
            same("d_ff", "d_ff", defaults["d_ff"]),
            same("n_encoder_layer", "num_layers", defaults["num_layers"]),
            same("n_head", "num_heads", defaults["num_heads"]),
            same("relative_buckets", "relative_attention_num_buckets", 32),
            same("relative_max_distance", "relative_attention_max_distance", 128),
            same("attention_dropout", "dropout_rate", 0.1),
            same("dropout", "dropout_rate", 0.1),
            same("norm_eps", "layer_norm_epsilon", 1e-6),
            FieldMapping(
                "activation", ("feed_forward_proj",), defaults["feed_forward_proj"], _ACTIVATIONS
            ),
            same("pad_id", "pad_token_id", 0),
            same("stop_id", "eos_token_id", 1),
        ],
        computed=[
            ComputedFields(
                keys=[
                    "num_decoder_layers",
                    "decoder_start_token_id",
                    "dense_act_fn",
                    "is_gated_act",
                ],
                read=_read_decoder,
                write=_write_decoder,
            ),
            *computed,
        ],
        legacy={"is_decoder": False},
        unused_keys=["initializer_factor", *options.pop("unused_keys", [])],
        tensors=_tensors,
        tied=dict.fromkeys(
            ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", _HEAD], "shared.weight"
        ),
        untied_head=_HEAD,
        # Of cross attention, which transformers does not use.
        ignored=[
            r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$"
        ],
        **options,
    )


T5 = _family(
    "t5",
    "T5ForConditionalGeneration",
    {
        "vocab_size": 32128, "d_ff": 2048, "num_layers": 6, "num_heads": 8,
        "feed_forward_proj": "relu",
    },
    computed=[
        ComputedFields(
            keys=["tie_word_embeddings", "scale_decoder_outputs"],
            read=_read_head,
            write=_write_head,
        )
    ],
)  # fmt: skip
MT5 = _family(
    "mt5",
    "MT5ForConditionalGeneration",
    {
        "vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6,
        "feed_forward_proj": "gated-gelu",
    },
    constants={"tied_head": False},
    computed=[ComputedFields(write=lambda _: {"tie_word_embeddings": False})],
    unused_keys=["tie_word_embeddings"],
)  # fmt: skip
