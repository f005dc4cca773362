"""Llama 4 text models (`Llama4ForCausalLM`): chunked attention, NoPE blocks, experts in between."""

from typing import Any

from tjx_nn.hf.decoder import ATTENTION, LAYER, decoder, decoder_tensors
from tjx_nn.hf.experts import EXPERT_CONSTANTS, expert_fields
from tjx_nn.hf.family import (
    TRANSPOSED,
    ComputedFields,
    Json,
    TensorMapping,
    concatenated,
    linear,
    same,
    tensor,
)
from tjx_nn.hf.layer_types import FULL, fixed_interval
from tjx_nn.hf.rope import read_number, rope
from tjx_nn.models.gpt_config import GPTConfig

_CHUNKED = "chunked_attention"
_MLP = f"{LAYER}.feed_forward"
_EXPERTS = [
    *tensor("blocks.mlp.router.kernel", f"{_MLP}.router.weight", TRANSPOSED),
    TensorMapping(
        ("blocks.mlp.gate.kernel", "blocks.mlp.up.kernel"),
        f"{_MLP}.experts.gate_up_proj",
        concatenated(2),
    ),
    *tensor("blocks.mlp.down.kernel", f"{_MLP}.experts.down_proj"),
    *linear("blocks.mlp.shared.gate", f"{_MLP}.shared_expert.gate_proj"),
    *linear("blocks.mlp.shared.up", f"{_MLP}.shared_expert.up_proj"),
    *linear("blocks.mlp.shared.down", f"{_MLP}.shared_expert.down_proj"),
]
_DENSE = [
    *linear("blocks.mlp.up", f"{_MLP}.up_proj"),
    *linear("blocks.mlp.gate", f"{_MLP}.gate_proj"),
    *linear("blocks.mlp.down", f"{_MLP}.down_proj"),
]
_TENSORS = [
    *(
        mapping._replace(params=tuple(f"dense_{param}" for param in mapping.params))
        for mapping in decoder_tensors(attention=ATTENTION, mlp=_DENSE)
        if mapping.params[0].startswith("blocks.")
    ),
    *decoder_tensors(mlp=_EXPERTS),
]


def _read_experts(config_json: Json) -> dict[str, Any]:
    count, every = config_json["num_hidden_layers"], config_json.get("interleave_moe_layer_step", 1)
    if type(every) is not int or every < 1:
        raise ValueError(f"interleave_moe_layer_step: got {every!r}; expected a positive integer")
    expected = list(range(every - 1, count, every))
    layers = config_json.get("moe_layers")
    if layers is not None and layers != expected:
        raise ValueError(
            f"moe_layers: got {str(layers)[:60]}; expected {str(expected)[:60]}, by "
            f"interleave_moe_layer_step {every}"
        )
    return {"experts.every": every}


def _write_experts(config: GPTConfig) -> dict[str, Any]:
    every = config.experts.every
    return {
        "interleave_moe_layer_step": every,
        "moe_layers": list(range(every - 1, config.n_layer, every)),
    }


def _read_attention(config_json: Json) -> dict[str, Any]:
    """Read which blocks have rotary embeddings, their chunks, and the temperature of the others."""
    count = config_json["num_hidden_layers"]
    interval = config_json.get("no_rope_layer_interval", 4)
    if type(interval) is not int or interval < 1:
        raise ValueError(f"no_rope_layer_interval: got {interval!r}; expected a positive integer")
    default = [int((layer + 1) % interval != 0) for layer in range(count)]
    has_rope = config_json.get("no_rope_layers") or default
    every, regular = None, isinstance(has_rope, list) and len(has_rope) == count
    if regular:
        every, regular = fixed_interval([rotated == 0 for rotated in has_rope])
    if not regular or any(each not in (0, 1) for each in has_rope):
        raise ValueError(
            f"no_rope_layers: got {str(has_rope)[:200]}; expected 1 for each of {count} layers, "
            "with 0 at a fixed interval"
        )
    chunk = config_json.get("attention_chunk_size", 8192)
    if type(chunk) is not int or chunk < 1:
        raise ValueError(f"attention_chunk_size: got {chunk!r}; expected a positive integer")
    chunked = [_CHUNKED if rotated else FULL for rotated in has_rope]
    kinds = config_json.get("layer_types")
    if kinds is not None and kinds not in (chunked, [FULL] * count):
        raise ValueError(
            f"layer_types: got {str(kinds)[:200]}; expected {_CHUNKED!r} where no_rope_layers is 1 "
            f"and {FULL!r} elsewhere, or {FULL!r} for all layers"
        )
    has_window = kinds != [FULL] * count and chunk < config_json["max_position_embeddings"]
    return {
        "nope_every": every,
        "window": chunk if has_window else None,
        "chunked_window": has_window,
        **_read_scales(config_json, every is not None),
    }


def _read_scales(config_json: Json, has_nope: bool) -> dict[str, Any]:
    tuned = config_json.get("attn_temperature_tuning", True)
    normalized = config_json.get("use_qk_norm", True)
    for key, value in {"attn_temperature_tuning": tuned, "use_qk_norm": normalized}.items():
        if type(value) is not bool:
            raise ValueError(f"{key}: got {str(value)[:60]}; expected a boolean")
    given = {"attn_scale": 0.1, "floor_scale": 8192, **config_json}
    length = given["floor_scale"]
    if type(length) is not int:
        raise ValueError(f"floor_scale: got {str(length)[:60]}; expected an integer")
    return {
        "nope_temperature": read_number(given, "attn_scale") if tuned and has_nope else 0.0,
        "nope_temperature_length": length,
        "qk_norm": normalized,
        "qk_norm_position": "after_rope" if normalized else "before_rope",
    }


def _write_attention(config: GPTConfig) -> dict[str, Any]:
    count, every = config.n_layer, config.nope_every or config.n_layer + 1
    has_rope = [int((layer + 1) % every != 0) for layer in range(count)]
    whole = config.window is None
    return {
        "no_rope_layers": has_rope,
        "no_rope_layer_interval": every,
        "layer_types": [_CHUNKED if rotated and not whole else FULL for rotated in has_rope],
        "attention_chunk_size": config.max_seq_len if whole else config.window,
        "attn_temperature_tuning": config.nope_temperature > 0,
        "attn_scale": config.nope_temperature or 0.1,
        "floor_scale": config.nope_temperature_length,
        "use_qk_norm": config.qk_norm,
    }


LLAMA4 = decoder(
    "llama4_text",
    "Llama4ForCausalLM",
    constants={
        "experts.scores": "sigmoid", "experts.normalize": False, "experts.scale_inputs": True,
        "experts.shared": 1, **EXPERT_CONSTANTS,
    },
    defaults={
        "vocab_size": 202048, "max_seq_len": 131072, "d_model": 5120, "d_ff": 16384, "n_layer": 48,
        "n_head": 40, "n_kv_head": 8, "norm_eps": 1e-5,
    },
    keys={"d_ff": "intermediate_size_mlp"},
    fields=[
        same("d_head", "head_dim", 128),
        *expert_fields(count=16, per_token=1),
        same("experts.d_ff", "intermediate_size", 8192),
    ],
    computed=[
        rope(base=5e5, interleaved=True),
        ComputedFields(
            keys=["interleave_moe_layer_step", "moe_layers"],
            read=_read_experts,
            write=_write_experts,
        ),
        ComputedFields(
            keys=["no_rope_layers", "no_rope_layer_interval", "layer_types",
                  "attention_chunk_size", "attn_temperature_tuning", "attn_scale", "floor_scale",
                  "use_qk_norm"],
            read=_read_attention,
            write=_write_attention,
        ),
    ],
    features={"attention_bias": False, "router_jitter_noise": 0.0},
    tensors=lambda _: _TENSORS,
    unused_keys=["output_router_logits"],
)  # fmt: skip
