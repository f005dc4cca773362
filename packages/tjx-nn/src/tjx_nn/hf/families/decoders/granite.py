"""Granite 3 (`GraniteForCausalLM`): Llama with factors of embeddings, scores and residuals."""

import math
from typing import Any

from tjx_nn.hf.decoder import HEAD_DIM, decoder
from tjx_nn.hf.family import ComputedFields, FieldMapping, Json, same
from tjx_nn.hf.rope import head_features, read_number, rope
from tjx_nn.models.gpt_config import GPTConfig

_KEYS = ("embedding_multiplier", "attention_multiplier", "logits_scaling")
_SMALLEST = 1e-6


def _read_factors(config_json: Json) -> dict[str, Any]:
    factors = [read_number(config_json, key) if key in config_json else 1.0 for key in _KEYS]
    if min(factors) < _SMALLEST:
        raise ValueError(f"{', '.join(_KEYS)}: got {factors}; expected at least {_SMALLEST}")
    embeddings, scores, logits = factors
    default = 1 / math.sqrt(head_features(config_json) or 1)
    return {
        "embedding_scale": None if embeddings == 1 else embeddings,
        "attention_scale": None if scores == default else scores,
        "logit_scale": 1 / logits,
    }


def _write_factors(config: GPTConfig) -> dict[str, Any]:
    return {
        "embedding_multiplier": config.embedding_scale or 1.0,
        "attention_multiplier": config.attention_scale or 1 / math.sqrt(config.head_dim),
        "logits_scaling": round(1 / config.logit_scale, 9),
    }


GRANITE = decoder(
    "granite",
    "GraniteForCausalLM",
    fields=[
        HEAD_DIM,
        FieldMapping("bias", ("attention_bias", "mlp_bias"), False),
        same("residual_scale", "residual_multiplier", 1.0),
    ],
    computed=[rope(), ComputedFields(keys=_KEYS, read=_read_factors, write=_write_factors)],
)
