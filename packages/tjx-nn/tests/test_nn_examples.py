"""Doctests of all modules."""

import doctest
import importlib
import pathlib

import jax
import pytest

import tjx_nn

SOURCES = pathlib.Path(tjx_nn.__file__).parent
MODULES = sorted(
    ".".join(["tjx_nn", *path.relative_to(SOURCES).with_suffix("").parts])
    for path in SOURCES.rglob("*.py")
    if ">>>" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("module", MODULES)
def test_doctests(module: str) -> None:
    with jax.transfer_guard("allow"):
        result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0
    assert result.failed == 0


def test_modules_have_doctests() -> None:
    assert len(MODULES) > 10
