"""Configurations: presets, all errors in one exception, and imports without JAX."""

import subprocess
import sys
from typing import Any

import pytest

from tjx_nn import EncoderDecoderConfig, ExpertsConfig, GPTConfig, LatentConfig, SparseConfig


def test_all_errors_are_in_one_exception() -> None:
    # In a subprocess, as pytest enables runtime type checks.
    code = """
from tjx_nn import GPTConfig
try:
    GPTConfig(n_layer=0, vocab_size=-1, dropout=1.0, activation="gelu", dtype="int8", remat="some")
except ValueError as error:
    print(*[line.split(":")[0] for line in str(error).splitlines()])
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.split() == [
        "vocab_size",
        "n_layer",
        "activation",
        "remat",
        "dtype",
        "dropout",
    ]


def test_indivisible_sizes_are_reported_with_a_fix() -> None:
    with pytest.raises(ValueError, match=r"d_model: got 100 with n_head 12;.*try d_model 96"):
        GPTConfig(d_model=100)
    with pytest.raises(ValueError, match=r"n_kv_head: got 5.*one of \[1, 2, 3, 4, 6, 12\]"):
        GPTConfig(n_kv_head=5)


def test_blocks_without_rotary_embeddings_have_no_window() -> None:
    rotary: dict[str, Any] = {"positions": "rope", "n_layer": 4, "max_seq_len": 64}
    assert GPTConfig(**rotary, nope_every=2).windows == (None, 64, None, 64)
    assert GPTConfig(**rotary, nope_every=4, global_every=3, window=8).windows == (8, 8, None, 64)
    assert EncoderDecoderConfig(**rotary, nope_every=2).cross.positions == "none"
    others: list[dict[str, Any]] = [{"positions": "alibi"}, {"latent": LatentConfig(kv_dim=8)}]
    for fields in others:
        with pytest.raises(ValueError, match="nope_every: got 2; expected None"):
            GPTConfig(**{**rotary, **fields}, nope_every=2)
    with pytest.raises(ValueError, match="window: got 64, which is max_seq_len"):
        GPTConfig(**rotary, nope_every=2, window=64)


def test_latent_and_sparse_attention_have_no_sinks_or_gates() -> None:
    others: list[dict[str, Any]] = [
        {"latent": LatentConfig(kv_dim=8)}, {"sparse": SparseConfig(top_k=4)}
    ]  # fmt: skip
    for fields in others:
        with pytest.raises(ValueError, match="attention_sinks: got True; expected False"):
            GPTConfig(**fields, attention_sinks=True)
        with pytest.raises(ValueError, match="attention_gate: got 4; expected None"):
            GPTConfig(**fields, attention_gate=4)
    with pytest.raises(ValueError, match="value_mix: got 'embedding'; expected 'none' with latent"):
        GPTConfig(**others[0], value_mix="embedding")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"global_first": True}, "global_first: got True with global_every None"),
        ({"chunked_window": True}, "chunked_window: got True; expected False without window"),
        (
            {"chunked_window": True, "window": 4, "sparse": SparseConfig(top_k=2, indexer=False)},
            "chunked_window: got True; expected False",
        ),
        ({"attention_gate": 769}, "attention_gate: got 769; expected at most 768"),
        ({"attention_gate": 0}, "attention_gate: got 0; expected"),
        ({"nope_temperature": 0.1}, "nope_temperature: got 0.1 with nope_every None"),
        ({"z_loss": float("nan")}, "z_loss: got nan; expected at least 0 and finite"),
        ({"multi_token_loss": -0.3}, "multi_token_loss: got -0.3; expected at least 0 and finite"),
        ({"nope_temperature": -1.0}, "nope_temperature: got -1.0; expected at least 0"),
        ({"qk_norm_position": "after_rope"}, "qk_norm_position: got 'after_rope'"),
        ({"experts": ExpertsConfig(count=2, every=5)}, "experts.every: got 5 with n_layer 12"),
        ({"experts": ExpertsConfig(count=2, every=2, first_layer=1)}, "experts.first_layer 1"),
    ],
)
def test_options_need_others(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        GPTConfig(**fields)


def test_blocks_with_experts_at_an_interval_are_numbered_in_order() -> None:
    config = GPTConfig(n_layer=6, experts=ExpertsConfig(count=2, every=3), window=4, global_every=2)
    assert config.stack_windows == ((4, None), (4,), (None, 4), (None,))
    assert [config.block_number(index, leading=True) for index in range(4)] == [0, 1, 3, 4]
    assert [config.block_number(index, leading=False) for index in range(2)] == [2, 5]
    assert "experts.every: got 3; expected 1" in config.pipeline_problems(2)[0]


def test_presets_take_overrides_and_suggest_the_nearest_name() -> None:
    config = GPTConfig.preset("gpt2_xl", dropout=0.1)
    assert (config.n_layer, config.n_head, config.d_model, config.dropout) == (48, 25, 1600, 0.1)
    with pytest.raises(ValueError, match="did you mean 'gpt2_small'"):
        GPTConfig.preset("gpt2_smal")


def test_importing_a_config_does_not_import_jax() -> None:
    code = (
        "import sys, tjx_nn; tjx_nn.count_params(tjx_nn.GPTConfig()); 'jax' in sys.modules and 1/0"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
