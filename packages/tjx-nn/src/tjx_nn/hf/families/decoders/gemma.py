"""Gemma 1, 2 and 3 without images (`GemmaForCausalLM`, `Gemma2ForCausalLM`, ...)."""

import math
from typing import Any

from tjx_nn.hf.decoder import GATED_ACTIVATIONS, decoder, decoder_tensors
from tjx_nn.hf.family import ComputedFields, Json, same
from tjx_nn.hf.layer_types import layer_windows
from tjx_nn.hf.rope import dual_rope, rope
from tjx_nn.models.gpt_config import GPTConfig

_EMBEDDING_SCALE = ComputedFields(
    read=lambda json: {"embedding_scale": math.sqrt(json["hidden_size"])}
)
_SANDWICH = decoder_tensors(
    norms={
        "ln_1": "input_layernorm",
        "ln_1_out": "post_attention_layernorm",
        "ln_2": "pre_feedforward_layernorm",
        "ln_2_out": "post_feedforward_layernorm",
    }
)


def _read_scale(config_json: Json) -> dict[str, Any]:
    scalar = config_json.get("query_pre_attn_scalar", 256)
    if type(scalar) not in (int, float) or not 0 < scalar < math.inf:
        raise ValueError(f"query_pre_attn_scalar: got {scalar!r}; expected a positive number")
    same_scale = scalar == config_json["head_dim"]
    return {"attention_scale": None if same_scale else 1 / math.sqrt(scalar)}


def _write_scale(config: GPTConfig) -> dict[str, Any]:
    scale = config.attention_scale
    return {"query_pre_attn_scalar": config.head_dim if scale is None else round(scale**-2)}


_SCALE = ComputedFields(keys=["query_pre_attn_scalar"], read=_read_scale, write=_write_scale)
_SIZES: dict[str, Any] = {
    "vocab_size": 256000, "max_seq_len": 8192, "d_model": 2304, "d_ff": 9216, "n_layer": 26,
    "n_head": 8, "n_kv_head": 4, "activation": "gelu_pytorch_tanh", "tied_head": True,
}  # fmt: skip
_SHARED: dict[str, Any] = {
    "features": {"attention_bias": False},
    "legacy": {"use_bidirectional_attention": False},
    "unused_keys": ["cache_implementation", "hidden_activation", "_sliding_window_pattern"],
}
_CAPPED: dict[str, Any] = {
    **_SHARED,
    "constants": {"norm_unit_offset": True, "norm_position": "sandwich"},
    "keys": {"activation": "hidden_activation"},
    "tensors": lambda _: _SANDWICH,
}


def _caps(logits: float | None, scores: float | None) -> list[Any]:
    return [
        same("d_head", "head_dim", 256),
        same("logit_soft_cap", "final_logit_softcapping", logits),
        same("attention_soft_cap", "attn_logit_softcapping", scores),
    ]


GEMMA = decoder(
    "gemma",
    "GemmaForCausalLM",
    constants={"norm_unit_offset": True},
    defaults={
        **_SIZES, "d_model": 3072, "d_ff": 24576, "n_layer": 28, "n_head": 16, "n_kv_head": 16,
    },
    fields=[same("d_head", "head_dim", 256)],
    # In files of the first release "gelu" means the tanh approximation.
    activations={**GATED_ACTIVATIONS, "gelu": "geglu"},
    computed=[rope(), _EMBEDDING_SCALE],
    **_SHARED,
)  # fmt: skip
GEMMA2 = decoder(
    "gemma2",
    "Gemma2ForCausalLM",
    defaults=_SIZES,
    fields=_caps(30.0, 50.0),
    computed=[
        rope(), _EMBEDDING_SCALE, _SCALE,
        layer_windows(lambda _, layer: layer % 2 == 1, default=4096),
    ],
    **_CAPPED,
)  # fmt: skip
GEMMA3 = decoder(
    "gemma3_text",
    "Gemma3ForCausalLM",
    defaults={**_SIZES, "vocab_size": 262208, "max_seq_len": 131072},
    fields=_caps(None, None),
    computed=[
        dual_rope(base=1e6, local_base=1e4, local_key="rope_local_base_freq"),
        _EMBEDDING_SCALE, _SCALE,
        layer_windows(
            lambda json, layer: (layer + 1) % json.get("sliding_window_pattern", 6) == 0,
            keys=["sliding_window_pattern"],
            default=4096,
        ),
    ],
    **{**_CAPPED, "constants": {**_CAPPED["constants"], "qk_norm": True}},
)  # fmt: skip
