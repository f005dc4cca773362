"""Everything wrong with an optimizer is said at once, and reading it needs no JAX."""

import subprocess
import sys
from dataclasses import fields
from typing import get_args

import docstring_parser
import pytest

from tjx_optim import OPTIMIZERS, OptimizerConfig
from tjx_optim.optimizer_config import OptimizerName


def test_all_problems_of_an_optimizer_are_named_together() -> None:
    with pytest.raises(ValueError, match="learning_rate=-1") as error:
        OptimizerConfig(
            learning_rate=-1.0, b1=1.0, b2=-0.1, eps=0.0, clip_norm=0.0, weight_decay=-1.0
        )
    lines = str(error.value).splitlines()
    assert [line.split("=")[0] for line in lines] == [
        "learning_rate",
        "weight_decay",
        "b1",
        "b2",
        "eps",
        "clip_norm",
    ]


def test_an_unknown_optimizer_lists_the_known_ones() -> None:
    # In a process of its own: here the test suite's type checker would refuse the name first.
    code = "from tjx_optim import OptimizerConfig; OptimizerConfig(name='adm')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    known = "adamw, lion, sgd"
    assert run.stderr.splitlines()[-1] == f"ValueError: name='adm': must be one of {known}"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"learning_rate=.*\n.*clip_norm="):
        OptimizerConfig(learning_rate=value, clip_norm=value)


def test_each_field_has_one_line_for_the_help() -> None:
    parsed = docstring_parser.parse(OptimizerConfig.__doc__ or "")
    documented = {p.arg_name: p.description for p in parsed.params}
    assert set(documented) == {field.name for field in fields(OptimizerConfig)}
    assert all(text and "\n" not in text for text in documented.values())


def test_the_names_of_the_configuration_are_those_of_the_table() -> None:
    assert set(get_args(OptimizerName)) == set(OPTIMIZERS)


def test_reading_an_optimizer_does_not_import_jax() -> None:
    code = "import sys, tjx_optim; tjx_optim.OptimizerConfig(); sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
