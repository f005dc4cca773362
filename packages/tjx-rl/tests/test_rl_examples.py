"""The examples in the docstrings run and print what they say."""

import doctest
import importlib

import jax
import pytest

MODULES = (
    "advantages environments kl policy_gradient preference verifiers.json_schema verifiers.text "
    "verifiers.verify"
)


@pytest.mark.parametrize("module", MODULES.split())
def test_rl_examples_of_a_module_run(module: str) -> None:
    with jax.transfer_guard("allow"):  # readers call the functions with any arrays
        result = doctest.testmod(importlib.import_module(f"tjx_rl.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
