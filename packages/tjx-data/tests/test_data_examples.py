"""Examples in docstrings run."""

import doctest
import importlib
import pkgutil

import pytest

import tjx_data

MODULES = [
    module.name
    for module in pkgutil.walk_packages(tjx_data.__path__, "tjx_data.")
    if not module.ispkg
]


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module: str) -> None:
    assert doctest.testmod(importlib.import_module(module)).failed == 0
