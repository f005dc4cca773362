"""SmolLM3 (`SmolLM3ForCausalLM`): blocks without rotary embeddings at a fixed interval (NoPE)."""

from typing import Any

from tjx_nn.hf.decoder import HEAD_DIM, decoder
from tjx_nn.hf.family import ComputedFields, FieldMapping, Json
from tjx_nn.hf.layer_types import FULL, fixed_interval
from tjx_nn.hf.rope import rope
from tjx_nn.models.gpt_config import GPTConfig


def _read_layers(config_json: Json) -> dict[str, Any]:
    count = config_json["num_hidden_layers"]
    interval = config_json.get("no_rope_layer_interval", 4)
    if type(interval) is not int or interval < 1:
        raise ValueError(f"no_rope_layer_interval: got {interval!r}; expected a positive integer")
    has_rope = config_json.get("no_rope_layers")
    if has_rope is None:
        has_rope = [int((layer + 1) % interval != 0) for layer in range(count)]
    if (
        not isinstance(has_rope, list)
        or len(has_rope) < count
        or any(each not in (0, 1) for each in has_rope)
    ):
        raise ValueError(
            f"no_rope_layers: got {str(has_rope)[:60]}; expected 0 or 1 for each of {count} layers"
        )
    every, regular = fixed_interval([rotated == 0 for rotated in has_rope[:count]])
    if not regular:
        raise ValueError(
            f"no_rope_layers: got {str(has_rope)[:200]}; expected 1, with 0 at a fixed interval"
        )
    # Blocks without rotary embeddings have the window, if there is one.
    windowed = config_json.get("use_sliding_window") and config_json.get("sliding_window")
    kinds = config_json.get("layer_types")
    if kinds != [FULL] * count and (kinds is not None or (windowed and every is not None)):
        raise ValueError(
            f"layer_types: got {str(kinds)[:60]} with sliding_window {windowed}; expected {FULL!r} "
            f"for each of {count} layers"
        )
    return {"nope_every": every}


def _write_layers(config: GPTConfig) -> dict[str, Any]:
    count, every = config.n_layer, config.nope_every or config.n_layer + 1
    return {
        "no_rope_layers": [int((layer + 1) % every != 0) for layer in range(count)],
        "no_rope_layer_interval": every,
        "layer_types": [FULL] * count,
        "use_sliding_window": False,
        "sliding_window": None,
    }


SMOLLM3 = decoder(
    "smollm3",
    "SmolLM3ForCausalLM",
    defaults={
        "vocab_size": 128256, "max_seq_len": 32768, "d_model": 2048, "n_layer": 36, "n_head": 16,
        "n_kv_head": 4, "tied_head": True,
    },
    fields=[HEAD_DIM, FieldMapping("bias", ("attention_bias", "mlp_bias"), False)],
    computed=[
        rope(base=2e6),
        ComputedFields(
            keys=["no_rope_layers", "no_rope_layer_interval", "layer_types", "use_sliding_window",
                  "sliding_window"],
            read=_read_layers,
            write=_write_layers,
        ),
    ],
)  # fmt: skip
