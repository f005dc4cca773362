"""Docstring examples run and print the shown output."""

import doctest
import importlib

import pytest

MODULES = (
    "config",
    "mesh",
    "multiprocess.consensus",
    "pipeline.schedule",
    "planning.hlo",
    "roofline.regions",
    "sharding.params",
    "sharding.rules",
)


@pytest.mark.parametrize("module", MODULES)
def test_module_examples_run(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"tjx_parallel.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
