"""DeepSeek-V2 and V3 (`DeepseekV2ForCausalLM`, ...; also R1): latent attention, expert groups."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from einops import rearrange

from tjx_nn.hf.decoder import LAYER, MLP, decoder, decoder_tensors
from tjx_nn.hf.experts import EXPERT_CONSTANTS, gated_experts
from tjx_nn.hf.family import (
    ComputedFields,
    Json,
    TensorMapping,
    TensorTransform,
    linear,
    norm,
    same,
    tensor,
)
from tjx_nn.hf.rope import read_number, rope, yarn_scale
from tjx_nn.models.gpt_config import GPTConfig
from tjx_nn.problems import raise_problems

_ATTENTION = f"{LAYER}.self_attn"
_EXPERTS = [
    *gated_experts("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    *tensor("blocks.mlp.choice_bias", f"{LAYER}.mlp.gate.e_score_correction_bias"),
    *linear("blocks.mlp.shared.gate", f"{LAYER}.mlp.shared_experts.gate_proj"),
    *linear("blocks.mlp.shared.up", f"{LAYER}.mlp.shared_experts.up_proj"),
    *linear("blocks.mlp.shared.down", f"{LAYER}.mlp.shared_experts.down_proj"),
]


def _tensors(config: GPTConfig) -> list[TensorMapping]:
    up = ("blocks.attention.key_up.kernel", "blocks.attention.value_up.kernel")
    by_head = _keys_values_by_head(config.n_head, config.head_dim)
    attention = [
        *linear("blocks.attention.query", f"{_ATTENTION}.q_proj"),
        *linear("blocks.attention.query_down", f"{_ATTENTION}.q_a_proj"),
        *norm("blocks.attention.query_norm", f"{_ATTENTION}.q_a_layernorm"),
        *linear("blocks.attention.query_up", f"{_ATTENTION}.q_b_proj"),
        *linear("blocks.attention.kv_down", f"{_ATTENTION}.kv_a_proj_with_mqa"),
        *norm("blocks.attention.kv_norm", f"{_ATTENTION}.kv_a_layernorm"),
        TensorMapping(up, f"{_ATTENTION}.kv_b_proj.weight", by_head),
        *linear("blocks.attention.out", f"{_ATTENTION}.o_proj"),
    ]
    dense = [
        mapping._replace(params=tuple(f"dense_{param}" for param in mapping.params))
        for mapping in decoder_tensors(attention=attention, mlp=MLP)
        if mapping.params[0].startswith("blocks.")
    ]
    return [*dense, *decoder_tensors(attention=attention, mlp=_EXPERTS)]


def _keys_values_by_head(heads: int, head_dim: int) -> TensorTransform:
    """Fuse the projections to keys and values, stored head by head."""

    def read(x: np.ndarray) -> list[np.ndarray]:
        by_head = rearrange(x, "(n h) c -> n h c", n=heads)
        parts = np.split(by_head, [head_dim], axis=1)
        return [rearrange(part, "n h c -> c (n h)") for part in parts]

    def write(parts: Sequence[np.ndarray]) -> np.ndarray:
        by_head = [rearrange(part, "c (n h) -> n h c", n=heads) for part in parts]
        return rearrange(np.concatenate(by_head, axis=1), "n h c -> (n h) c")

    return TensorTransform(read, write, lambda shapes: (sum(s[1] for s in shapes), shapes[0][0]))


def _check_sizes(config_json: Json) -> None:
    """Raise for sizes that tjx or transformers does not support."""
    sizes = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank",
             "n_routed_experts", "n_shared_experts")  # fmt: skip
    raise_problems(
        [
            f"{name}: got {config_json[name]!r}; expected at least 1"
            for name in sizes
            if not config_json[name]
        ]
    )
    rotary = config_json["qk_rope_head_dim"]
    derived = {"head_dim": rotary, "qk_head_dim": rotary + config_json["qk_nope_head_dim"]}
    raise_problems(
        [
            f"{name}: got {str(config_json[name])[:60]}; expected {size}, by the sizes of "
            "qk_rope_head_dim and qk_nope_head_dim"
            for name, size in derived.items()
            if config_json.get(name, size) != size
        ]
    )


def _read_attention(config_json: Json) -> dict[str, Any]:
    """Read rotary embeddings; with YaRN, mscale_all_dim scales queries and keys."""
    _check_sizes(config_json)
    found = _ROPE.read(config_json)["rope"]
    given = config_json.get("rope_parameters") or config_json.get("rope_scaling") or {}
    weight = read_number(given, "mscale_all_dim") if given.get("mscale_all_dim") else 0.0
    scale = yarn_scale(found.factor, weight)
    size = config_json["qk_nope_head_dim"] + config_json["qk_rope_head_dim"]
    interleaved = config_json.get("rope_interleave", True)
    if type(interleaved) is not bool:
        raise ValueError(f"rope_interleave: got {interleaved!r}; expected a boolean")
    return {
        "rope": dataclasses.replace(found, interleaved=interleaved),
        "attention_scale": None if scale == 1 else scale**2 / math.sqrt(size),
    }


def _write_attention(config: GPTConfig) -> dict[str, Any]:
    entries = _ROPE.write(config)
    scale, of_yarn = config.attention_scale, yarn_scale(config.rope.factor)
    if scale is not None and config.rope.scaling == "yarn" and of_yarn > 1:
        scale = math.sqrt(scale * math.sqrt(config.head_dim + config.latent.rope_dim))
        given = entries["rope_parameters"]
        given["mscale_all_dim"] = round((scale - 1) / (of_yarn - 1), 6)
        if given.get("attention_factor") == 1:
            given["mscale"] = given["mscale_all_dim"]
            del given["attention_factor"]
    return entries


def _read_groups(config_json: Json) -> dict[str, Any]:
    """Read the groups of DeepSeek-V2, which only one of its methods uses."""
    match config_json.get("topk_method", "greedy"):
        case "greedy":
            return {}
        case "group_limited_greedy":
            numbers = {
                "experts.groups": config_json.get("n_group"),
                "experts.groups_per_token": config_json.get("topk_group"),
            }
            if all(type(number) is int for number in numbers.values()):
                return numbers
            raise ValueError(
                f"n_group, topk_group: got {list(numbers.values())}; expected integers"
            )
        case method:
            raise ValueError(
                f"topk_method: got {str(method)[:60]!r}; expected greedy or group_limited_greedy"
            )


def _write_groups(config: GPTConfig) -> dict[str, Any]:
    experts = config.experts
    if experts.groups == 1:
        return {"topk_method": "greedy"}
    return {
        "topk_method": "group_limited_greedy",
        "n_group": experts.groups,
        "topk_group": experts.groups_per_token,
    }


_ROPE = rope()
_ATTENTION_KEYS = [*_ROPE.keys, "head_dim", "qk_head_dim"]
_CONSTANTS: dict[str, Any] = {"norm_eps": 1e-6, **EXPERT_CONSTANTS}
_FIELDS = [
    same("d_head", "qk_nope_head_dim", 128),
    same("latent.kv_dim", "kv_lora_rank", 512),
    same("latent.q_dim", "q_lora_rank", 1536),
    same("latent.rope_dim", "qk_rope_head_dim", 64),
    same("latent.v_dim", "v_head_dim", 128),
    same("experts.balance_loss", "aux_loss_alpha", 0.001),
]
_SHARED: dict[str, Any] = {
    "keys": {"norm_eps": None},
    # Keys of the first release, which transformers does not read.
    "unused_keys": ["ep_size", "output_router_logits", "seq_aux"],
    "tensors": _tensors,
}
# The norms of latents have this epsilon whatever the key is.
_FEATURES = {"attention_bias": False, "rms_norm_eps": 1e-6}

DEEPSEEK_V2 = decoder(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    constants={**_CONSTANTS, "experts.normalize": False, "experts.group_top_k": 1},
    defaults={"vocab_size": 102400},
    fields=[
        *_FIELDS,
        same("experts.count", "n_routed_experts", 64),
        same("experts.per_token", "num_experts_per_tok", None),
        same("experts.shared", "n_shared_experts", 2),
        same("experts.d_ff", "moe_intermediate_size", 1407),
        same("experts.first_layer", "first_k_dense_replace", 0),
        same("experts.weight_scale", "routed_scaling_factor", 1.0),
    ],
    computed=[
        ComputedFields(keys=_ATTENTION_KEYS, read=_read_attention, write=_write_attention),
        ComputedFields(
            keys=["topk_method", "n_group", "topk_group"], read=_read_groups, write=_write_groups
        ),
    ],
    features={**_FEATURES, "mlp_bias": False, "norm_topk_prob": False},
    legacy={"moe_layer_freq": 1, "scoring_func": "softmax"},
    aliases={"num_experts": "n_routed_experts"},
    **_SHARED,
)
DEEPSEEK_V3 = decoder(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    constants={
        **_CONSTANTS, "experts.scores": "sigmoid", "experts.choice_bias": True,
        "experts.group_top_k": 2,
    },
    defaults={
        "vocab_size": 129280, "max_seq_len": 4096, "d_model": 7168, "d_ff": 18432, "n_layer": 61,
        "n_head": 128, "n_kv_head": 128,
    },
    fields=[
        *_FIELDS,
        same("experts.count", "n_routed_experts", 256),
        same("experts.per_token", "num_experts_per_tok", 8),
        same("experts.shared", "n_shared_experts", 1),
        same("experts.d_ff", "moe_intermediate_size", 2048),
        same("experts.first_layer", "first_k_dense_replace", 3),
        same("experts.weight_scale", "routed_scaling_factor", 2.5),
        same("experts.normalize", "norm_topk_prob", True),
        same("experts.groups", "n_group", 8),
        same("experts.groups_per_token", "topk_group", 4),
    ],
    computed=[
        ComputedFields(
            keys=[*_ATTENTION_KEYS, "rope_interleave"],
            read=_read_attention,
            write=lambda config: {
                **_write_attention(config), "rope_interleave": config.rope.interleaved,
            },
        ),
    ],
    features=_FEATURES,
    legacy={"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    aliases={
        "num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers",
    },
    # Multi-token prediction, a block after the last one, which transformers does not load either.
    ignored=[r"^model\.layers\.61\.", r"\.rotary_emb\.inv_freq$"],
    **_SHARED | {"unused_keys": [*_SHARED["unused_keys"], "num_nextn_predict_layers"]},
)  # fmt: skip
