"""StarCoder2 (`Starcoder2ForCausalLM`): LayerNorm and an MLP without a gate."""

from tjx_nn.hf.decoder import LAYER, decoder, decoder_tensors
from tjx_nn.hf.family import PLAIN_ACTIVATIONS, linear, same

_TENSORS = decoder_tensors(
    mlp=[
        *linear("blocks.mlp.up", f"{LAYER}.mlp.c_fc"),
        *linear("blocks.mlp.down", f"{LAYER}.mlp.c_proj"),
    ]
)

STARCODER2 = decoder(
    "starcoder2",
    "Starcoder2ForCausalLM",
    constants={"norm": "layernorm", "bias": True},
    defaults={
        "vocab_size": 49152, "max_seq_len": 4096, "d_model": 3072, "d_ff": 12288, "n_layer": 30,
        "n_head": 24, "n_kv_head": 2, "activation": "gelu_pytorch_tanh", "norm_eps": 1e-5,
        "init_std": 0.018042, "tied_head": True,
    },
    keys={"norm_eps": "norm_epsilon"},
    activations={"gelu_pytorch_tanh": "gelu_tanh", **PLAIN_ACTIVATIONS},
    fields=[
        same("window", "sliding_window", None),
        same("dropout", "residual_dropout", 0.0),
        same("embedding_dropout", "embedding_dropout", 0.0),
    ],
    # Without use_bias the norms still have biases.
    features={"use_bias": True},
    tensors=lambda _: _TENSORS,
    unused_keys=["activation_function", "attention_softmax_in_fp32", "layer_norm_epsilon",
                 "mlp_type", "norm_type", "scale_attention_softmax_in_fp32", "scale_attn_weights"],
)  # fmt: skip
