"""Command R and Command R7B (`CohereForCausalLM`, `Cohere2ForCausalLM`): parallel blocks."""

from typing import Any

from tjx_nn.hf.decoder import HEAD_DIM, decoder, decoder_tensors
from tjx_nn.hf.family import ComputedFields, Json, same
from tjx_nn.hf.layer_types import FULL, SLIDING, layer_windows
from tjx_nn.hf.rope import rope
from tjx_nn.models.gpt_config import GPTConfig

_TENSORS = decoder_tensors(norms={"ln_1": "input_layernorm"})
_WINDOWS = layer_windows(
    lambda json, layer: (layer + 1) % json.get("sliding_window_pattern", 4) == 0,
    keys=["sliding_window_pattern"],
    default=4096,
)


def _read_windows(config_json: Json) -> dict[str, Any]:
    """Read the blocks of Command R7B: those without a window have no rotary embeddings."""
    found = _WINDOWS.read(config_json)
    if found["window"] is None:
        return {"nope_every": 1}
    return {"window": found["window"], "nope_every": found["global_every"]}


def _write_windows(config: GPTConfig) -> dict[str, Any]:
    every = 1 if config.window is None else config.nope_every or config.n_layer + 1
    kinds = [SLIDING if (layer + 1) % every else FULL for layer in range(config.n_layer)]
    return {"sliding_window": config.window, "layer_types": kinds}


_SHARED: dict[str, Any] = {
    "constants": {"norm": "layernorm", "parallel_block": True},
    "defaults": {
        "vocab_size": 256000, "max_seq_len": 8192, "d_model": 8192, "d_ff": 22528, "n_layer": 40,
        "n_head": 64, "norm_eps": 1e-5, "tied_head": True,
    },
    "keys": {"norm_eps": "layer_norm_eps"},
    "fields": [HEAD_DIM, same("logit_scale", "logit_scale", 0.0625)],
    # Keys of the first releases, which transformers does not read.
    "legacy": {
        "order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj",
        "rotary_pct": 1.0, "use_embedding_sharing": True, "use_gated_activation": True,
        "use_parallel_block": True, "use_parallel_embedding": False,
    },
    "tensors": lambda _: _TENSORS,
    "unused_keys": ["cache_implementation", "layer_switch"],
}  # fmt: skip

COHERE = decoder(
    "cohere",
    "CohereForCausalLM",
    computed=[rope(base=5e5, interleaved=True)],
    features={"attention_bias": False, "use_qk_norm": False},
    **_SHARED,
)
COHERE2 = decoder(
    "cohere2",
    "Cohere2ForCausalLM",
    computed=[
        rope(interleaved=True),
        ComputedFields(keys=_WINDOWS.keys, read=_read_windows, write=_write_windows),
    ],
    features={"attention_bias": False},
    **_SHARED,
)
