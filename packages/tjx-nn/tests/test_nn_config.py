"""Configurations: presets, everything wrong at once, and no JAX needed to read one."""

import subprocess
import sys

import pytest

from tjx_nn import GPTConfig


def test_every_problem_is_reported_at_once() -> None:
    # In a process of its own: under pytest the types of arguments are checked first.
    code = """
from tjx_nn import GPTConfig
try:
    GPTConfig(n_layer=0, vocab_size=-1, dropout=1.0, activation="gelu", dtype="int8", remat="some")
except ValueError as error:
    print(*[line.split()[0] for line in str(error).splitlines()])
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


def test_sizes_that_do_not_divide_name_both_and_a_way_out() -> None:
    with pytest.raises(ValueError, match=r"d_model is 100 and n_head is 12.*try d_model 96"):
        GPTConfig(d_model=100)
    with pytest.raises(ValueError, match=r"n_kv_head is 5.*one of \[1, 2, 3, 4, 6, 12\]"):
        GPTConfig(n_kv_head=5)


def test_preset_takes_overrides_and_suggests_the_nearest_name() -> None:
    config = GPTConfig.preset("gpt2_xl", dropout=0.1)
    assert (config.n_layer, config.n_head, config.d_model, config.dropout) == (48, 25, 1600, 0.1)
    with pytest.raises(ValueError, match="did you mean 'gpt2_small'"):
        GPTConfig.preset("gpt2_smal")


def test_reading_a_config_does_not_import_jax() -> None:
    code = (
        "import sys, tjx_nn; tjx_nn.count_params(tjx_nn.GPTConfig()); 'jax' in sys.modules and 1/0"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
