"""The examples in the docstrings run and print what they say."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("module", ["config", "mesh", "sharding.rules", "sharding.params"])
def test_the_examples_of_a_module_run(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"tjx_parallel.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
