"""Llama and Mistral (`LlamaForCausalLM`, `MistralForCausalLM`); also SmolLM2."""

from tjx_nn.hf.decoder import HEAD_DIM, decoder
from tjx_nn.hf.family import FieldMapping, same

LLAMA = decoder(
    "llama",
    "LlamaForCausalLM",
    fields=[HEAD_DIM, FieldMapping("bias", ("attention_bias", "mlp_bias"), False)],
)
MISTRAL = decoder(
    "mistral",
    "MistralForCausalLM",
    defaults={"max_seq_len": 131072, "d_ff": 14336, "n_kv_head": 8},
    fields=[HEAD_DIM, same("window", "sliding_window", 4096)],
)
