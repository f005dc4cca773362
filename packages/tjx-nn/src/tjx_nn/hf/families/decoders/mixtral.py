"""Mixtral (`MixtralForCausalLM`): Mistral with a mixture of experts."""

from tjx_nn.hf.decoder import HEAD_DIM, decoder
from tjx_nn.hf.experts import EXPERT_CONSTANTS, expert_fields, expert_tensors
from tjx_nn.hf.family import same
from tjx_nn.hf.rope import rope

MIXTRAL = decoder(
    "mixtral",
    "MixtralForCausalLM",
    constants={"experts.normalize": True, **EXPERT_CONSTANTS},
    defaults={"max_seq_len": 131072, "d_ff": 14336, "n_kv_head": 8, "norm_eps": 1e-5},
    fields=[
        HEAD_DIM,
        same("window", "sliding_window", None),
        *expert_fields(count=8, per_token=2),
    ],
    computed=[rope(base=1e6)],
    features={"router_jitter_noise": 0.0},
    tensors=expert_tensors("block_sparse_moe", gate="w1", up="w3", down="w2"),
    unused_keys=["output_router_logits"],
)
