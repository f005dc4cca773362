"""The examples in the docstrings run and print what they say."""

import doctest
import importlib

import jax
import pytest


@pytest.mark.parametrize(
    "module",
    [
        "checkpointer",
        "cli.array_diff",
        "cli.key_paths",
        "cli.terminal",
        "cli.safetensors_export",
        "leaf_spec",
        "retention",
        "orbax_format",
        "pytree",
        "tree_file",
    ],
)
def test_the_examples_of_a_module_run(module: str) -> None:
    with jax.transfer_guard("allow"):
        result = doctest.testmod(importlib.import_module(f"tjx_ckpt.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
