"""Families of decoders of the Llama lineage: `decoder` needs only their differences from Llama."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tjx_nn.hf.family import (
    ComputedFields,
    FieldMapping,
    ModelFamily,
    TensorMapping,
    linear,
    norm,
    same,
    tensor,
)
from tjx_nn.hf.rope import rope
from tjx_nn.models.gpt_config import GPTConfig

LAYER = "model.layers.{layer}"
# transformers names of the activation of a gate; saving uses the first of several.
GATED_ACTIVATIONS = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
ATTENTION = [
    *linear("blocks.attention.query", f"{LAYER}.self_attn.q_proj"),
    *linear("blocks.attention.key", f"{LAYER}.self_attn.k_proj"),
    *linear("blocks.attention.value", f"{LAYER}.self_attn.v_proj"),
    *linear("blocks.attention.out", f"{LAYER}.self_attn.o_proj"),
    *norm("blocks.attention.query_norm", f"{LAYER}.self_attn.q_norm"),
    *norm("blocks.attention.key_norm", f"{LAYER}.self_attn.k_norm"),
]
MLP = [
    *linear("blocks.mlp.up", f"{LAYER}.mlp.up_proj"),
    *linear("blocks.mlp.gate", f"{LAYER}.mlp.gate_proj"),
    *linear("blocks.mlp.down", f"{LAYER}.mlp.down_proj"),
]
NORMS = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm"}

# Key of config.json and default value of each tjx field in Llama.
_FIELDS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 32000),
    "max_seq_len": ("max_position_embeddings", 2048),
    "d_model": ("hidden_size", 4096),
    "d_ff": ("intermediate_size", 11008),
    "n_layer": ("num_hidden_layers", 32),
    "n_head": ("num_attention_heads", 32),
    "n_kv_head": ("num_key_value_heads", None),
    "activation": ("hidden_act", "silu"),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "init_std": ("initializer_range", 0.02),
    "attention_dropout": ("attention_dropout", 0.0),
    "tied_head": ("tie_word_embeddings", False),
}
# Field of families that read head_dim.
HEAD_DIM = same("d_head", "head_dim", None)


def decoder_tensors(
    *,
    attention: Sequence[TensorMapping] = ATTENTION,
    mlp: Sequence[TensorMapping] = MLP,
    norms: Mapping[str, str] = NORMS,
) -> list[TensorMapping]:
    """Return the tensor mappings of a decoder.

    Parameters
    ----------
    attention, mlp
        Mappings of these layers.
    norms
        transformers name of each norm of a block.
    """
    blocks = [
        each for own, name in norms.items() for each in norm(f"blocks.{own}", f"{LAYER}.{name}")
    ]
    return [
        *tensor("wte.embedding", "model.embed_tokens.weight"),
        *blocks,
        *attention,
        *mlp,
        *norm("ln_f", "model.norm"),
        *tensor("head.embedding", "lm_head.weight"),
    ]


def decoder(
    model_type: str,
    architecture: str,
    *,
    constants: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
    keys: Mapping[str, str | None] | None = None,
    activations: Mapping[str, str] = GATED_ACTIVATIONS,
    fields: Sequence[FieldMapping] = (),
    computed: Sequence[ComputedFields] = (rope(),),
    features: Mapping[str, Any] | None = None,
    tensors: Callable[[Any], Sequence[TensorMapping]] | None = None,
    unused_keys: Sequence[str] = (),
    **options: Any,
) -> ModelFamily:
    """Describe a family of decoders by its differences from Llama.

    Parameters
    ----------
    model_type, architecture
        As for `ModelFamily`.
    constants
        Values of tjx fields; by default rotary positions and RMSNorm without biases.
    defaults
        Values of tjx fields that config.json lacks, where they differ from Llama's.
    keys
        Keys of config.json of tjx fields, where they differ from Llama's; None for a field without
        a key.
    activations
        tjx activation of each transformers name.
    fields
        Further field mappings.
    computed, features, unused_keys, **options
        As for `ModelFamily`.
    tensors
        Tensor mappings of a configuration; None is those of Llama.

    Examples
    --------
    >>> family = decoder("my_llama", "MyLlamaForCausalLM", defaults={"norm_eps": 1e-5})
    >>> [field.default for field in family.fields if field.field == "norm_eps"]
    [1e-05]
    """
    keys, defaults = keys or {}, defaults or {}
    mappings = [
        FieldMapping(
            name,
            (own_key,),
            defaults.get(name, value),
            activations if name == "activation" else None,
        )
        for name, (key, value) in _FIELDS.items()
        if (own_key := keys.get(name, key)) is not None
    ]
    llama = decoder_tensors()
    return ModelFamily(
        model_type=model_type,
        architecture=architecture,
        config=GPTConfig,
        constants={"positions": "rope", "norm": "rmsnorm", "bias": False, **(constants or {})},
        fields=[*mappings, *fields],
        computed=computed,
        features=features or {},
        unused_keys=["is_llama_config", *unused_keys],
        fills={"vocab_multiple": 1},
        tensors=tensors or (lambda _: llama),
        **{
            # A key of SmolLM2 and Llama 3.2 that no transformers version reads.
            "legacy": {"rope_interleaved": False},
            "tied": {"lm_head.weight": "model.embed_tokens.weight"},
            # RoPE frequencies that old transformers versions stored.
            "ignored": [r"\.rotary_emb\.inv_freq$"],
            **options,
        },
    )
