"""GPT-NeoX and Pythia (`GPTNeoXForCausalLM`): partial rotary embeddings, parallel blocks."""

from collections.abc import Sequence

import numpy as np
from einops import rearrange

from tjx_nn.hf.decoder import decoder
from tjx_nn.hf.family import (
    PLAIN_ACTIVATIONS,
    TensorMapping,
    TensorTransform,
    linear,
    norm,
    same,
    tensor,
)
from tjx_nn.hf.rope import rope
from tjx_nn.models.gpt_config import GPTConfig

_LAYER = "gpt_neox.layers.{layer}"


def _tensors(config: GPTConfig) -> list[TensorMapping]:
    names = [f"blocks.attention.{name}" for name in ("query", "key", "value")]
    qkv = f"{_LAYER}.attention.query_key_value"
    fused = _by_head(config.n_head)
    return [
        *tensor("wte.embedding", "gpt_neox.embed_in.weight"),
        *norm("blocks.ln_1", f"{_LAYER}.input_layernorm"),
        *norm("blocks.ln_2", f"{_LAYER}.post_attention_layernorm"),
        TensorMapping(tuple(f"{name}.kernel" for name in names), f"{qkv}.weight", fused),
        TensorMapping(tuple(f"{name}.bias" for name in names), f"{qkv}.bias", fused),
        *linear("blocks.attention.out", f"{_LAYER}.attention.dense"),
        *linear("blocks.mlp.up", f"{_LAYER}.mlp.dense_h_to_4h"),
        *linear("blocks.mlp.down", f"{_LAYER}.mlp.dense_4h_to_h"),
        *norm("ln_f", "gpt_neox.final_layer_norm"),
        *tensor("head.embedding", "embed_out.weight"),
    ]


def _by_head(heads: int) -> TensorTransform:
    """Fuse query, key and value, stored head by head: rows (heads, 3, head_dim)."""

    def read(x: np.ndarray) -> list[np.ndarray]:
        return list(rearrange(x, "(n p h) ... -> p ... (n h)", n=heads, p=3))

    def write(parts: Sequence[np.ndarray]) -> np.ndarray:
        return rearrange(np.stack(parts), "p ... (n h) -> (n p h) ...", n=heads)

    return TensorTransform(read, write, lambda shapes: (3 * shapes[0][-1], *shapes[0][:-1]))


GPT_NEOX = decoder(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    constants={"norm": "layernorm", "bias": True, "parallel_norm": "separate"},
    defaults={
        "vocab_size": 50432, "d_model": 6144, "d_ff": 24576, "n_layer": 44, "n_head": 64,
        "activation": "gelu", "norm_eps": 1e-5,
    },
    keys={"norm_eps": "layer_norm_eps", "n_kv_head": None},
    activations=PLAIN_ACTIVATIONS,
    fields=[
        same("parallel_block", "use_parallel_residual", True),
        same("dropout", "hidden_dropout", 0.0),
    ],
    computed=[rope(rotary=0.25)],
    features={"attention_bias": True},
    aliases={"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"},
    tensors=_tensors,
    unused_keys=["is_decoder"],
    renamed=[(r"^lm_head\.", "embed_out.")],
    ignored=[r"\.attention\.(masked_)?bias$", r"\.rotary_emb\.inv_freq$"],
)  # fmt: skip
