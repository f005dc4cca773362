"""OLMo 2 (`Olmo2ForCausalLM`): norms of the outputs of sublayers, and of all queries and keys."""

from tjx_nn.hf.decoder import decoder, decoder_tensors

_TENSORS = decoder_tensors(
    norms={"ln_1": "post_attention_layernorm", "ln_2": "post_feedforward_layernorm"}
)

OLMO2 = decoder(
    "olmo2",
    "Olmo2ForCausalLM",
    constants={"norm_position": "output", "qk_norm": True, "qk_norm_features": "all"},
    defaults={"vocab_size": 50304, "norm_eps": 1e-5},
    features={"attention_bias": False},
    tensors=lambda _: _TENSORS,
)
