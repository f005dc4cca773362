"""The examples in the docstrings run and print what they say."""

import doctest
import importlib

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
        "pytree",
    ],
)
def test_the_examples_of_a_module_run(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"tjx_ckpt.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
