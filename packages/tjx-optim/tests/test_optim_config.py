"""Everything wrong with a configuration is said at once, and reading it needs no JAX."""

import subprocess
import sys
from dataclasses import fields
from typing import Any, get_args

import docstring_parser
import pytest

from tjx_optim import OPTIMIZERS, SCHEDULES, OptimizerConfig, ScheduleConfig
from tjx_optim.config import OptimizerName, ScheduleName


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


@pytest.mark.parametrize(
    ("config", "known"),
    [("OptimizerConfig", "adamw, lion, sgd"), ("ScheduleConfig", "cosine, linear, constant")],
)
def test_an_unknown_name_lists_the_known_ones(config: Any, known: str) -> None:
    # In a process of its own: here the test suite's type checker would refuse the name first.
    code = f"from tjx_optim import {config}; {config}(name='adm')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stderr.splitlines()[-1] == f"ValueError: name='adm': must be one of {known}"


def test_a_decay_that_ends_within_the_warm_up_is_refused() -> None:
    with pytest.raises(ValueError, match=r"decay_steps=10: .* above warmup_steps=10"):
        ScheduleConfig(warmup_steps=10, decay_steps=10)
    ScheduleConfig(warmup_steps=10, decay_steps=11)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"learning_rate=.*\n.*clip_norm="):
        OptimizerConfig(learning_rate=value, clip_norm=value)
    with pytest.raises(ValueError, match="final_fraction="):
        ScheduleConfig(final_fraction=value)


@pytest.mark.parametrize("config", [OptimizerConfig, ScheduleConfig])
def test_each_field_has_one_line_for_the_help(config: Any) -> None:
    documented = {p.arg_name: p.description for p in docstring_parser.parse(config.__doc__).params}
    assert set(documented) == {field.name for field in fields(config)}
    assert all(text and "\n" not in text for text in documented.values())


def test_the_names_of_the_configuration_are_those_of_the_tables() -> None:
    assert set(get_args(OptimizerName)) == set(OPTIMIZERS)
    assert set(get_args(ScheduleName)) == set(SCHEDULES)


def test_reading_a_configuration_does_not_import_jax() -> None:
    code = "import sys, tjx_optim; tjx_optim.OptimizerConfig(); sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
