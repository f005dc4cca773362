"""OLMo 2 and 3 (`Olmo2ForCausalLM`, ...): norms of sublayer outputs, queries and keys."""

from typing import Any

from tjx_nn.hf.decoder import decoder, decoder_tensors
from tjx_nn.hf.layer_types import layer_windows
from tjx_nn.hf.rope import dual_rope

_TENSORS = decoder_tensors(
    norms={"ln_1": "post_attention_layernorm", "ln_2": "post_feedforward_layernorm"}
)
_SHARED: dict[str, Any] = {
    "constants": {"norm_position": "output", "qk_norm": True, "qk_norm_features": "all"},
    "defaults": {"vocab_size": 50304, "norm_eps": 1e-5},
    "features": {"attention_bias": False},
    "tensors": lambda _: _TENSORS,
}

OLMO2 = decoder("olmo2", "Olmo2ForCausalLM", **_SHARED)
OLMO3 = decoder(
    "olmo3",
    "Olmo3ForCausalLM",
    computed=[
        dual_rope(base=5e5, local_base=5e5, local_key=None),
        layer_windows(lambda _, layer: (layer + 1) % 4 == 0, default=4096),
    ],
    **_SHARED,
)
