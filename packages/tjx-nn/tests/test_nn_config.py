"""Configurations: presets, all errors in one exception, and imports without JAX."""

import subprocess
import sys

import pytest

from tjx_nn import GPTConfig


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
