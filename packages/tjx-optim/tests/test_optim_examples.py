"""The examples in the docstrings run and print what they say."""

import doctest
import importlib

import pytest

MODULES = (
    "accumulation guard matrix_optimizers.muon matrix_optimizers.partition norms optimizer_config "
    "optimizers param_averaging param_groups param_masks param_rules registry schedule_config "
    "schedule_plot schedules"
)


@pytest.mark.parametrize("module", MODULES.split())
def test_the_examples_of_a_module_run(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"tjx_optim.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
