"""Llama, Mistral and Qwen3 (`LlamaForCausalLM`, `MistralForCausalLM`, `Qwen3ForCausalLM`)."""

import math
from collections.abc import Mapping
from types import NoneType
from typing import Any

from tjx_nn.hf.family import FieldMapping, Json, ModelFamily, linear, norm, same, tensor
from tjx_nn.models.gpt_config import GPTConfig
from tjx_nn.sub_configs import RopeConfig, RopeScaling, raise_problems

_ACTIVATIONS = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
# tjx scaling of each transformers rope type, and the transformers keys of its numbers.
_SCALINGS: dict[str, RopeScaling] = {
    "default": "none",
    "linear": "linear",
    "llama3": "llama3",
    "yarn": "yarn",
}
_NUMBERS: dict[RopeScaling, dict[str, str]] = {
    "none": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_seq_len": "original_max_position_embeddings",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_seq_len": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
    },
}
_LARGEST_NUMBER = 1e15


def read_rope(config_json: Json) -> dict[str, Any]:
    """Read the RoPE configuration.

    transformers 5 stores it in rope_parameters; earlier versions in rope_theta and rope_scaling,
    whose rope type could be named "type".
    """
    candidates: tuple[Any, ...] = (
        config_json.get("rope_parameters"),
        config_json.get("rope_scaling"),
        {},
    )
    given = next(each for each in candidates if each is not None)
    if not isinstance(given, Mapping):
        raise ValueError(f"rope_parameters: got {str(given)[:60]}; expected an object")
    kinds = (given.get("rope_type"), given.get("type"), "default")
    kind = next(kind for kind in kinds if kind is not None)
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise ValueError(f"rope_type: got {kind!r}; expected one of {list(_SCALINGS)}")
    names = _NUMBERS[_SCALINGS[kind]]
    numbers: dict[str, Any] = {
        field: _number(given, key) for field, key in names.items() if given.get(key) is not None
    }
    if "factor" in names and "factor" not in numbers:
        raise ValueError(f"factor: missing; expected a number for rope_type {kind!r}")
    if "original_seq_len" in names:
        length = numbers.pop("original_seq_len", config_json.get("max_position_embeddings", 0))
        numbers["original_seq_len"] = int(length)
    # Old checkpoints have this key at the top level.
    options = {"partial_rotary_factor": config_json.get("partial_rotary_factor"), **given}
    # Supported values of other keys: the defaults, and the attention factor that tjx computes.
    supported = {"truncate": True, "partial_rotary_factor": 1.0}
    if kind == "yarn":
        supported["attention_factor"] = 0.1 * math.log(numbers.get("factor", 1.0)) + 1
    known = {"rope_type", "type", "rope_theta", *names.values()}
    raise_problems(
        [
            f"rope_parameters.{name}: got {value!r}; expected no such key, which tjx does not "
            "support"
            for name, value in options.items()
            if name not in known and value is not None and supported.get(name) != value
        ]
    )
    source = config_json if given.get("rope_theta") is None else given
    base = 10000.0 if source.get("rope_theta") is None else _number(source, "rope_theta")
    return {"rope": RopeConfig(base=base, scaling=_SCALINGS[kind], **numbers)}


def _number(given: Json, name: str) -> float:
    value = given[name]
    if type(value) not in (int, float) or not abs(value) < _LARGEST_NUMBER:
        raise ValueError(
            f"{name}: got {str(value)[:60]}; expected a number below {_LARGEST_NUMBER:g}"
        )
    return float(value)


def write_rope(config: GPTConfig) -> dict[str, Any]:
    """Return the rope_parameters entry of config.json."""
    rope = config.rope
    kinds = (kind for kind, scaling in _SCALINGS.items() if scaling == rope.scaling)
    names = _NUMBERS.get(rope.scaling, {})
    numbers = {key: getattr(rope, field) for field, key in names.items()}
    kind = next(kinds, "default")
    return {"rope_parameters": {"rope_type": kind, "rope_theta": rope.base, **numbers}}


def _read_layers(config_json: Json) -> dict[str, Any]:
    """Read the RoPE configuration and the pattern of attention windows of Qwen3."""
    window, count = config_json.get("sliding_window"), config_json.get("num_hidden_layers", 32)
    uses, first = (
        config_json.get("use_sliding_window", False),
        config_json.get("max_window_layers", 28),
    )
    window = window if uses else None
    wrong = (type(uses), type(first)) != (bool, int) or type(window) not in (int, NoneType)
    if wrong:
        raise ValueError(
            f"use_sliding_window: got {uses!r} with sliding_window {window!r} and "
            "max_window_layers "
            f"{first!r}; expected a boolean and integers"
        )
    kinds = config_json.get("layer_types") or [
        "full_attention" if window is None or layer < first else "sliding_attention"
        for layer in range(count)
    ]
    if (
        not isinstance(kinds, list)
        or len(kinds) != count
        or not all(isinstance(kind, str) for kind in kinds)
    ):
        raise ValueError(
            f"layer_types: got {str(kinds)[:60]}; expected a type for each of {count} layers"
        )
    full = [kind == "full_attention" for kind in kinds]
    rope = read_rope(config_json)
    if all(full):
        return {"window": None, **rope}
    every = full.index(True) + 1 if True in full else None
    pattern = [every is not None and (layer + 1) % every == 0 for layer in range(count)]
    if window is None or full != pattern or set(kinds) - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"layer_types: got {str(kinds)[:200]} with sliding_window {window}; expected "
            "'sliding_attention', with 'full_attention' at a fixed interval"
        )
    return {"window": window, "global_every": every, **rope}


def _write_layers(config: GPTConfig) -> dict[str, Any]:
    kinds = ["full_attention" if w is None else "sliding_attention" for w in config.windows]
    return {
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "layer_types": kinds,
        **write_rope(config),
    }


_LAYER = "model.layers.{layer}"
_TENSORS = [
    *tensor("wte.embedding", "model.embed_tokens.weight"),
    *norm("blocks.ln_1", f"{_LAYER}.input_layernorm"),
    *linear("blocks.attention.query", f"{_LAYER}.self_attn.q_proj"),
    *linear("blocks.attention.key", f"{_LAYER}.self_attn.k_proj"),
    *linear("blocks.attention.value", f"{_LAYER}.self_attn.v_proj"),
    *linear("blocks.attention.out", f"{_LAYER}.self_attn.o_proj"),
    *norm("blocks.attention.query_norm", f"{_LAYER}.self_attn.q_norm"),
    *norm("blocks.attention.key_norm", f"{_LAYER}.self_attn.k_norm"),
    *norm("blocks.ln_2", f"{_LAYER}.post_attention_layernorm"),
    *linear("blocks.mlp.up", f"{_LAYER}.mlp.up_proj"),
    *linear("blocks.mlp.gate", f"{_LAYER}.mlp.gate_proj"),
    *linear("blocks.mlp.down", f"{_LAYER}.mlp.down_proj"),
    *norm("ln_f", "model.norm"),
    *tensor("head.embedding", "lm_head.weight"),
]
_FIELDS = [
    same("d_model", "hidden_size", 4096),
    same("n_layer", "num_hidden_layers", 32),
    same("n_head", "num_attention_heads", 32),
    FieldMapping("activation", ("hidden_act",), "silu", _ACTIVATIONS),
    same("norm_eps", "rms_norm_eps", 1e-6),
    same("init_std", "initializer_range", 0.02),
    same("attention_dropout", "attention_dropout", 0.0),
    same("tied_head", "tie_word_embeddings", False),
]
_SHARED: dict[str, Any] = {
    "config": GPTConfig,
    "fills": {"vocab_multiple": 1},
    "tensors": lambda _: _TENSORS,
    "tied": {"lm_head.weight": "model.embed_tokens.weight"},
    # RoPE frequencies that old transformers versions stored.
    "ignored": [r"\.rotary_emb\.inv_freq$"],
}
_CONSTANTS = {"positions": "rope", "norm": "rmsnorm"}

LLAMA = ModelFamily(
    model_type="llama",
    architecture="LlamaForCausalLM",
    constants=_CONSTANTS,
    fields=[
        *_FIELDS,
        same("vocab_size", "vocab_size", 32000),
        same("max_seq_len", "max_position_embeddings", 2048),
        same("d_ff", "intermediate_size", 11008),
        same("n_kv_head", "num_key_value_heads", None),
        same("d_head", "head_dim", None),
        FieldMapping("bias", ("attention_bias", "mlp_bias"), False),
    ],
    read_extra=read_rope,
    write_extra=write_rope,
    **_SHARED,
)

MISTRAL = ModelFamily(
    model_type="mistral",
    architecture="MistralForCausalLM",
    constants={**_CONSTANTS, "bias": False},
    fields=[
        *_FIELDS,
        same("vocab_size", "vocab_size", 32000),
        same("max_seq_len", "max_position_embeddings", 131072),
        same("d_ff", "intermediate_size", 14336),
        same("n_kv_head", "num_key_value_heads", 8),
        same("d_head", "head_dim", None),
        same("window", "sliding_window", 4096),
    ],
    read_extra=read_rope,
    write_extra=write_rope,
    **_SHARED,
)

QWEN3 = ModelFamily(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    constants={**_CONSTANTS, "bias": False, "qk_norm": True},
    fields=[
        *_FIELDS,
        same("vocab_size", "vocab_size", 151936),
        same("max_seq_len", "max_position_embeddings", 32768),
        same("d_ff", "intermediate_size", 22016),
        same("n_kv_head", "num_key_value_heads", 32),
        same("d_head", "head_dim", 128),
    ],
    features={"attention_bias": False},
    read_extra=_read_layers,
    write_extra=_write_layers,
    **_SHARED,
)
