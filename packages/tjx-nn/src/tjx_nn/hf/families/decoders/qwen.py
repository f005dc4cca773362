"""Qwen2 (also 2.5), Qwen3 and Qwen3-MoE (`Qwen2ForCausalLM`, ...)."""

from tjx_nn.hf.decoder import HEAD_DIM, decoder
from tjx_nn.hf.experts import EXPERT_CONSTANTS, expert_fields, expert_tensors
from tjx_nn.hf.family import same
from tjx_nn.hf.layer_types import layer_windows, uniform_window
from tjx_nn.hf.rope import rope

# The first max_window_layers blocks have no window.
_WINDOWS = layer_windows(
    lambda json, layer: layer < json.get("max_window_layers", 28),
    keys=["max_window_layers"],
    optional=True,
)
_SIZES = {"vocab_size": 151936, "max_seq_len": 32768, "d_ff": 22016, "n_kv_head": 32}

QWEN2 = decoder(
    "qwen2",
    "Qwen2ForCausalLM",
    constants={"qkv_bias": True},
    defaults=_SIZES,
    fields=[HEAD_DIM],
    computed=[rope(), _WINDOWS],
)
QWEN3 = decoder(
    "qwen3",
    "Qwen3ForCausalLM",
    constants={"qk_norm": True},
    defaults=_SIZES,
    fields=[same("d_head", "head_dim", 128)],
    computed=[rope(), _WINDOWS],
    features={"attention_bias": False},
)
QWEN3_MOE = decoder(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    constants={"qk_norm": True, **EXPERT_CONSTANTS},
    defaults={**_SIZES, "d_model": 2048, "d_ff": 6144, "n_layer": 24, "n_kv_head": 4},
    fields=[
        HEAD_DIM,
        *expert_fields(count=128, per_token=8),
        same("experts.d_ff", "moe_intermediate_size", 768),
        same("experts.normalize", "norm_topk_prob", False),
    ],
    computed=[rope(), uniform_window()],
    features={"attention_bias": False, "mlp_only_layers": [], "decoder_sparse_step": 1},
    aliases={"num_experts": "num_local_experts"},
    tensors=expert_tensors("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    unused_keys=["max_window_layers", "output_router_logits"],
)
