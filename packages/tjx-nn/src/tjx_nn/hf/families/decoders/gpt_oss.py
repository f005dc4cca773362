"""gpt-oss (`GptOssForCausalLM`): attention sinks, and experts with biases and a clamped SwiGLU."""

from typing import Any

from tjx_nn.hf.decoder import ATTENTION, LAYER, decoder, decoder_tensors
from tjx_nn.hf.experts import EXPERT_CONSTANTS, expert_fields
from tjx_nn.hf.family import (
    ComputedFields,
    FieldMapping,
    Json,
    TensorMapping,
    interleaved,
    linear,
    same,
    tensor,
)
from tjx_nn.hf.layer_types import layer_windows
from tjx_nn.hf.rope import rope

_EXPERTS = f"{LAYER}.mlp.experts"
_TENSORS = decoder_tensors(
    attention=[
        *ATTENTION,
        *tensor("blocks.attention.sink_bias", f"{LAYER}.self_attn.sinks"),
    ],
    mlp=[
        *linear("blocks.mlp.router", f"{LAYER}.mlp.router"),
        *(
            TensorMapping(
                (f"blocks.mlp.gate.{param}", f"blocks.mlp.up.{param}"),
                f"{_EXPERTS}.gate_up_proj{suffix}",
                interleaved(2),
            )
            for param, suffix in (("kernel", ""), ("bias", "_bias"))
        ),
        *tensor("blocks.mlp.down.kernel", f"{_EXPERTS}.down_proj"),
        *tensor("blocks.mlp.down.bias", f"{_EXPERTS}.down_proj_bias"),
    ],
)
_ROPE = rope(base=150000.0)
_DEFAULT_ROPE = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


def _read_rope(config_json: Json) -> dict[str, Any]:
    given = (config_json.get(key) for key in ("rope_parameters", "rope_scaling"))
    missing = all(value is None for value in given)
    return _ROPE.read({**config_json, "rope_parameters": _DEFAULT_ROPE} if missing else config_json)


GPT_OSS = decoder(
    "gpt_oss",
    "GptOssForCausalLM",
    constants={
        "attention_sinks": True, "experts.use_bias": True, "experts.normalize": True,
        **EXPERT_CONSTANTS,
    },
    defaults={
        "vocab_size": 201088, "max_seq_len": 131072, "d_model": 2880, "d_ff": 2880, "n_layer": 36,
        "n_head": 64, "n_kv_head": 8, "norm_eps": 1e-5,
    },
    activations={"silu": "clamped_swiglu"},
    fields=[
        same("d_head", "head_dim", 64),
        same("swiglu_limit", "swiglu_limit", 7.0),
        FieldMapping("bias", ("attention_bias",), True),
        *expert_fields(count=128, per_token=4),
    ],
    computed=[
        ComputedFields(keys=_ROPE.keys, read=_read_rope, write=_ROPE.write),
        layer_windows(lambda _, layer: layer % 2 == 1, default=128),
    ],
    features={"swiglu_alpha": 1.702},
    aliases={"num_experts": "num_local_experts"},
    tensors=lambda _: _TENSORS,
    # Keys of the release of OpenAI, which transformers does not read.
    unused_keys=["experts_per_token", "initial_context_length", "output_router_logits"],
)  # fmt: skip
