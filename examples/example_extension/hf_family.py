"""A family of Hugging Face models: Arcee (`ArceeForCausalLM`), Llama with an MLP without a gate."""

from tjx_nn import hf
from tjx_nn.hf.decoder import HEAD_DIM, LAYER, decoder, decoder_tensors
from tjx_nn.hf.family import PLAIN_ACTIVATIONS, FieldMapping, linear

TENSORS = decoder_tensors(
    mlp=[
        *linear("blocks.mlp.up", f"{LAYER}.mlp.up_proj"),
        *linear("blocks.mlp.down", f"{LAYER}.mlp.down_proj"),
    ]
)

ARCEE = hf.register(
    decoder(
        "arcee",
        "ArceeForCausalLM",
        # Where config.json lacks a key, and the default is not that of Llama.
        defaults={
            "d_model": 2560, "d_ff": 18432, "max_seq_len": 4096, "norm_eps": 1e-5,
            "activation": "relu2",
        },
        activations=PLAIN_ACTIVATIONS,
        fields=[HEAD_DIM, FieldMapping("bias", ("attention_bias", "mlp_bias"), False)],
        tensors=lambda _: TENSORS,
    )
)  # fmt: skip
