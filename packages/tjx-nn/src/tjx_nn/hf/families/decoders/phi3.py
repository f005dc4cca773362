"""Phi-3 and Phi-4 (`Phi3ForCausalLM`): fused projections, partial rotary embeddings, LongRoPE."""

import dataclasses
from typing import Any

from tjx_nn.hf.decoder import LAYER, decoder, decoder_tensors
from tjx_nn.hf.family import ComputedFields, Json, TensorMapping, fused_linear, linear, same
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


_ROPE = rope(rotary=1.0, types=("default", "longrope", "su"))
_LENGTH, _ORIGINAL = "max_position_embeddings", "original_max_position_embeddings"


def _read_rope(config_json: Json) -> dict[str, Any]:
    """Read the rotary embeddings; with LongRoPE max_seq_len is the length before the extension.

    transformers chooses short or long factors by the length of each sequence, and computes the
    cache of a generation that exceeds the original length anew. tjx chooses by max_seq_len: up to
    the original length the factors are the same, and longer sequences raise.
    """
    original = config_json.get(_ORIGINAL, 4096)
    fields = _ROPE.read({**config_json, _LENGTH: original})
    found = fields["rope"]
    if found.scaling != "longrope":
        return fields
    if type(original) is not int or found.original_seq_len != original or original < 2:
        raise ValueError(
            f"{_ORIGINAL}: got {str(original)[:60]}, and {found.original_seq_len} in "
            "rope_parameters; expected equal integers of at least 2"
        )
    given = config_json.get("rope_parameters") or config_json["rope_scaling"]
    factor = found.factor if given.get("factor") is not None else config_json[_LENGTH] / original
    return {"rope": dataclasses.replace(found, factor=factor), "max_seq_len": original}


def _write_rope(config: GPTConfig) -> dict[str, Any]:
    entries, original = _ROPE.write(config), config.rope.original_seq_len
    if config.rope.scaling != "longrope" or original is None:
        return entries
    length = round(config.rope.factor * original)
    if length / original == config.rope.factor:
        del entries["rope_parameters"]["factor"]
    return {**entries, _LENGTH: length, _ORIGINAL: original}


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
    computed=[ComputedFields(keys=(*_ROPE.keys, _ORIGINAL), read=_read_rope, write=_write_rope)],
    features={"attention_bias": False},
    tensors=_tensors,
)  # fmt: skip
