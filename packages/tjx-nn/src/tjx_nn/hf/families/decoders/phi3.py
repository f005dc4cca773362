"""Phi-3 and Phi-4 (`Phi3ForCausalLM`): fused projections, partial rotary embeddings."""

from tjx_nn.hf.decoder import LAYER, decoder, decoder_tensors
from tjx_nn.hf.family import TensorMapping, fused_linear, linear, same
from tjx_nn.hf.rope import rope
from tjx_nn.models.gpt_config import GPTConfig


def _tensors(config: GPTConfig) -> list[TensorMapping]:
    query, key = config.n_head * config.head_dim, config.kv_heads * config.head_dim
    names = [f"blocks.attention.{name}.kernel" for name in ("query", "key", "value")]
    qkv = TensorMapping(
        tuple(names), f"{LAYER}.self_attn.qkv_proj.weight", fused_linear([query, key, key])
    )
    gate_up = TensorMapping(
        ("blocks.mlp.gate.kernel", "blocks.mlp.up.kernel"),
        f"{LAYER}.mlp.gate_up_proj.weight",
        fused_linear([config.ff_dim] * 2),
    )
    return decoder_tensors(
        attention=[qkv, *linear("blocks.attention.out", f"{LAYER}.self_attn.o_proj")],
        mlp=[gate_up, *linear("blocks.mlp.down", f"{LAYER}.mlp.down_proj")],
    )


PHI3 = decoder(
    "phi3",
    "Phi3ForCausalLM",
    defaults={
        "vocab_size": 32064, "max_seq_len": 4096, "d_model": 3072, "d_ff": 8192, "norm_eps": 1e-5,
    },
    fields=[
        same("window", "sliding_window", None),
        same("dropout", "resid_pdrop", 0.0),
        same("embedding_dropout", "embd_pdrop", 0.0),
    ],
    # Every other type of Phi-3 is "longrope".
    computed=[rope(rotary=1.0, types=("default",))],
    features={"attention_bias": False},
    tensors=_tensors,
    unused_keys=["original_max_position_embeddings"],
)  # fmt: skip
