"""config.json of transformers: default values, unknown keys and mutations.

`tools/golden/make_hf_mutations.py` writes configs.json.
"""

import dataclasses
import functools
import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest

from tjx_nn import GPTConfig, bind, count_params, hf
from tjx_nn.binding import Params
from tjx_nn.hf.convert_config import functional_fields, read_config, write_config
from tjx_nn.hf.decoder import decoder
from tjx_nn.hf.families import BUILT_IN, all_families, register
from tjx_nn.hf.family import ModelFamily

GOLDEN = pathlib.Path(__file__).parent / "golden"
CONFIGS = json.loads((GOLDEN / "configs.json").read_text())
LENGTH = 16  # tokens of a golden input
# Keys without a default that works.
REQUIRED = {"deepseek_v2": {"num_experts_per_tok": 6}}
ATOL = 1e-3  # of recorded logits; the mutations change them by more


LONGROPE = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}


def config_of(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((GOLDEN / name / "config.json").read_text())
    return config


def family_of(config: dict[str, Any]) -> ModelFamily:
    return next(family for family in BUILT_IN if family.model_type == config["model_type"])


def mutated(mutation: dict[str, Any]) -> dict[str, Any]:
    entries = config_of(mutation["model"]) | mutation["set"]
    return {key: value for key, value in entries.items() if key not in mutation["drop"]}


@functools.partial(jax.jit, static_argnums=0)
def last_logits(config: Any, params: Params, inputs: dict[str, jax.Array]) -> jax.Array:
    texts = [inputs[name] for name in ("source", "tokens") if name in inputs]
    masks = {name: inputs[name] for name in ("source_mask",) if name in inputs}
    found: jax.Array = bind(config, params)(*texts, **masks)[:, -1, ::16].ravel()
    return found


@pytest.mark.parametrize("family", BUILT_IN, ids=lambda family: family.model_type)
def test_missing_keys_have_the_defaults_of_transformers(family: ModelFamily) -> None:
    required = REQUIRED.get(family.model_type, {})
    whole = {**CONFIGS["defaults"][family.model_type], **required}
    empty = {key: whole[key] for key in ("model_type", "architectures", *required)}
    missing, given = read_config(family, empty), read_config(family, whole)
    assert functional_fields(missing) == functional_fields(given)


def test_the_releases_of_gpt_oss_have_the_published_sizes() -> None:
    """OpenAI 2025, "gpt-oss-120b & gpt-oss-20b Model Card", table 1."""
    scaling = {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    }  # fmt: skip
    entries = {"model_type": "gpt_oss", "experts_per_token": 4, "initial_context_length": 4096}
    entries |= {"rope_theta": 150000, "rope_scaling": scaling, "router_aux_loss_coef": 0.9}
    family = family_of(entries)
    large = read_config(family, entries)
    small = read_config(family, {**entries, "num_hidden_layers": 24, "num_local_experts": 32})
    sizes = [round(count_params(config) / 1e9, 2) for config in (large, small)]
    assert sizes == [116.83, 20.91]
    missing = read_config(family, {"model_type": "gpt_oss"})
    assert functional_fields(large) == functional_fields(missing)


@pytest.mark.parametrize("name", sorted(path.parent.name for path in GOLDEN.glob("*/golden.npz")))
def test_unknown_keys_raise(name: str) -> None:
    if not (GOLDEN / name / "config.json").exists():  # an adapter
        return
    config = config_of(name)
    with pytest.raises(ValueError, match=r"residual_gain: got 0\.5; expected no such key"):
        read_config(family_of(config), config | {"residual_gain": 0.5})


def test_mutated_configs_that_read_as_the_same_model_have_the_same_logits() -> None:
    base, compared = {}, 0
    for mutation in CONFIGS["mutations"]:
        name, entries = mutation["model"], mutated(mutation)
        if name not in base:
            with np.load(GOLDEN / name / "golden.npz") as file:
                logits = file["logits"][:, -1, ::16].ravel()
            original = config_of(name)
            base[name] = functional_fields(read_config(family_of(original), original)), logits
        try:
            config = read_config(family_of(entries), entries)
        except ValueError:
            continue
        fields, logits = base[name]
        if mutation["logits"] is not None and functional_fields(config) == fields:
            compared += 1
            np.testing.assert_allclose(mutation["logits"], logits, atol=ATOL, err_msg=str(mutation))
    assert compared > 40


@pytest.mark.slow
def test_mutated_configs_that_load_have_the_logits_of_transformers(tmp_path: pathlib.Path) -> None:
    compared = 0
    for number, mutation in enumerate(CONFIGS["mutations"]):
        folder = tmp_path / str(number)
        shutil.copytree(GOLDEN / mutation["model"], folder)
        (folder / "config.json").write_text(json.dumps(mutated(mutation)))
        try:
            config, params = hf.load(folder)
        except ValueError:
            continue
        if mutation["logits"] is None or config.max_seq_len < LENGTH:
            continue
        with np.load(GOLDEN / mutation["model"] / "golden.npz") as file:
            inputs = {x: file[x] for x in ("source", "source_mask", "tokens") if x in file}
        found = jax.device_get(last_logits(config, *jax.device_put((params, inputs))))
        np.testing.assert_allclose(found, mutation["logits"], atol=ATOL, err_msg=str(mutation))
        compared += 1
    assert compared > 60


def test_rope_of_phi_4_mini_reads_as_published() -> None:
    """Microsoft 2025, "Phi-4-Mini Technical Report": 128K tokens, partial rotary embeddings."""
    entries = {
        "model_type": "phi3", "hidden_size": 3072, "num_attention_heads": 24,
        "num_key_value_heads": 8, "sliding_window": 262144,
        "partial_rotary_factor": 0.75, "rope_theta": 10000.0,
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
        "rope_scaling": LONGROPE,
    }  # fmt: skip
    config = read_config(family_of(entries), entries)
    assert (config.max_seq_len, config.longest_seq_len, config.rope.dim) == (4096, 131072, 96)
    assert config.rope.factor == 32
    written = write_config(family_of(entries), config)
    assert written["max_position_embeddings"] == 131072
    assert written["original_max_position_embeddings"] == 4096
    longer = dataclasses.replace(config, max_seq_len=131072)
    assert write_config(family_of(entries), longer) == written


def test_options_that_no_family_has_are_not_written() -> None:
    config = GPTConfig(value_mix="first_block", embedding_skip=True)
    with pytest.raises(ValueError, match="value_mix: got 'first_block'; expected 'none'") as caught:
        write_config(family_of({"model_type": "gpt2"}), config)
    assert "embedding_skip: got True; expected False" in str(caught.value)


def test_the_module_of_multi_token_prediction_is_omitted(tmp_path: pathlib.Path, make: Any) -> None:
    config = GPTConfig(vocab_size=11, max_seq_len=8, n_layer=2, n_head=2, d_model=4)
    params = make(dataclasses.replace(config, multi_token_loss=0.3))
    with jax.transfer_guard("allow"):
        hf.save(tmp_path / "model", dataclasses.replace(config, multi_token_loss=0.3), params)
    found, loaded = hf.load(tmp_path / "model")
    assert found == dataclasses.replace(config, embedding_dropout=0.0)
    expected = {name: x for name, x in jax.device_get(params).items() if name != "multi_token"}
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)


def test_registered_families_load_and_their_names_are_unique() -> None:
    mine = decoder("own_llama", "OwnLlamaForCausalLM", defaults={"d_model": 64})
    assert register(mine) is register(mine)
    assert all_families().count(mine) == 1
    assert read_config(mine, {"model_type": "own_llama"}).d_model == 64
    with pytest.raises(ValueError, match="family: got llama"):
        register(decoder("llama", "LlamaForCausalLM"))


@pytest.mark.parametrize(
    ("model_type", "entries", "told"),
    [
        ("qwen3_moe", {"num_experts": 4, "num_local_experts": 8}, "num_experts: got 4 with"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("phi3", {"rope_scaling": {"type": "su"}}, "short_factor: got None; expected a list"),
        ("phi3", {"rope_scaling": LONGROPE | {"short_factor": [1.0] * 3}}, "expected 48, half of"),
        ("phi3", {"rope_scaling": LONGROPE | {"long_factor": [0.0] * 48}}, "expected a positive"),
        ("phi3", {"rope_scaling": LONGROPE | {"original_max_position_embeddings": 8}},
         "original_max_position_embeddings: got 4096, and 8 in rope_parameters"),
        ("llama", {"rope_scaling": LONGROPE}, "rope_type: got 'longrope'"),
        ("phi3", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type: got 'yarn'"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar: got 0"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, "expected full_attention"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern"),
        ("gemma3_text", {"layer_types": ["full_attention"]}, "layer_types"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("deepseek_v3", {"n_shared_experts": 0}, "n_shared_experts: got 0; expected at least 1"),
        ("deepseek_v3", {"head_dim": 128}, "head_dim: got 128; expected 64"),
        ("deepseek_v3", {"qk_nope_head_dim": None}, "qk_nope_head_dim: got None"),
        ("deepseek_v3", {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale_all_dim": [1]}},
         r"mscale_all_dim: got \[1\]; expected a number"),
        ("deepseek_v3", {"rope_interleave": None}, "rope_interleave: got None"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func: got 'softmax'"),
        ("deepseek_v2", {"num_experts_per_tok": 6, "topk_method": "noaux_tc"}, "topk_method: got"),
        ("deepseek_v2", {"num_experts_per_tok": 6, "topk_method": "group_limited_greedy"},
         "n_group, topk_group: got"),
        ("smollm3", {"no_rope_layers": [0] + [1] * 35}, "expected 1, with 0 at a fixed interval"),
        ("smollm3", {"no_rope_layers": [[]] * 36}, "expected 0 or 1 for each of 36 layers"),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 8}, "layer_types: got None"),
        ("granite", {"logits_scaling": 0}, "logits_scaling: got"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm: got True"),
        ("cohere2", {"sliding_window": None}, "layer_types: got"),
        ("olmo3", {"rope_local_base_freq": 1e4}, "rope_local_base_freq: got"),
        ("gpt_oss", {"swiglu_alpha": 1.0}, "swiglu_alpha: got 1.0; expected 1.702"),
        ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act: got 'gelu'"),
        ("llama4_text", {"no_rope_layers": [0] + [1] * 47}, "with 0 at a fixed interval"),
        ("llama4_text", {"layer_types": ["chunked_attention"] * 48}, "layer_types: got"),
        ("llama4_text", {"attention_chunk_size": None}, "attention_chunk_size: got None"),
        ("llama4_text", {"interleave_moe_layer_step": 5}, "experts.every: got 5"),
        ("llama4_text", {"moe_layers": [0, 1]}, r"moe_layers: got \[0, 1\]; expected \[0, 1, 2"),
        ("llama4_text", {"use_qk_norm": 1}, "use_qk_norm: got 1; expected a boolean"),
        ("llama4_text", {"floor_scale": 0.5}, "floor_scale: got 0.5; expected an integer"),
        ("llama4_text", {"attention_bias": True}, "attention_bias: got True"),
        ("starcoder2", {"use_bias": False}, "use_bias: got False"),
        ("modernbert", {"local_attention": 1}, "local_attention: got 1"),
        ("modernbert", {"classifier_activation": "silu"}, "as tjx has one activation"),
        ("modernbert", {"attention_bias": True}, "as tjx has one bias"),
        ("modernbert", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: got"),
        ("modernbert", {"rope_theta": 1e4}, "rope_theta: got"),
        ("modernbert", {"tie_word_embeddings": False}, "tie_word_embeddings: got False"),
        ("roberta", {"max_position_embeddings": 2}, "max_position_embeddings: got 2"),
        ("dinov2", {"drop_path_rate": 0.1}, "drop_path_rate: got 0.1; expected 0.0"),
        ("dinov2", {"image_size": [224, 448]}, r"image_size: got \[224, 448\]; expected a square"),
        ("dinov2", {"mlp_ratio": 4.5}, "mlp_ratio: got 4.5; expected a positive integer"),
        ("dinov2", {"use_swiglu_ffn": None}, "use_swiglu_ffn: got None; expected a boolean"),
        ("dinov2", {"hidden_act": "mish"}, "hidden_act: got 'mish'; expected one of"),
        ("dinov2", {"hidden_act": ["gelu"]}, r"hidden_act: got \['gelu'\]; expected one of"),
        ("dinov2", {"num_register_tokens": 4}, "num_register_tokens: got 4; expected no such key"),
        ("siglip", {"vision_config": [1]}, r"vision_config: got \[1\]; expected an object"),
        ("siglip", {"vision_config": {"model_type": "clip"}}, "vision_config.model_type: got clip"),
        ("siglip", {"vision_config": {"gain": 2}}, "gain: got 2; expected no such key"),
        ("siglip", {"id2label": "cat"}, "id2label: got cat; expected an object"),
        ("siglip_vision_model", {"vision_use_head": 1}, "vision_use_head: got 1; expected a bool"),
        ("siglip_vision_model", {"image_size": [8, 16]}, r"image_size: got \[8, 16\]; expected a"),
        ("llama", {"rope_scaling": {"type": "default"}, "rope_parameters": {}}, "one of both"),
    ],
)  # fmt: skip
def test_unsupported_values_raise(model_type: str, entries: dict[str, Any], told: str) -> None:
    family = family_of({"model_type": model_type})
    with pytest.raises(ValueError, match=told):
        read_config(family, {"model_type": model_type, **entries})
