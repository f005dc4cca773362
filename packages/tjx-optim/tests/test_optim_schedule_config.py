"""Everything wrong with a schedule is said at once, and reading it needs no JAX."""

import subprocess
import sys
from dataclasses import fields
from typing import get_args

import docstring_parser
import pytest

from tjx_optim import SCHEDULES, ScheduleConfig
from tjx_optim.schedule_config import ScheduleName


def test_an_unknown_schedule_lists_the_known_ones() -> None:
    # In a process of its own: here the test suite's type checker would refuse the name first.
    code = "from tjx_optim import ScheduleConfig; ScheduleConfig(name='adm')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    known = "cosine, linear, constant"
    assert run.stderr.splitlines()[-1] == f"ValueError: name='adm': must be one of {known}"


def test_a_decay_that_ends_within_the_warm_up_is_refused() -> None:
    with pytest.raises(ValueError, match=r"decay_steps=10: .* above warmup_steps=10"):
        ScheduleConfig(warmup_steps=10, decay_steps=10)
    ScheduleConfig(warmup_steps=10, decay_steps=11)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_final_fraction_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="final_fraction="):
        ScheduleConfig(final_fraction=value)


def test_each_field_has_one_line_for_the_help() -> None:
    parsed = docstring_parser.parse(ScheduleConfig.__doc__ or "")
    documented = {p.arg_name: p.description for p in parsed.params}
    assert set(documented) == {field.name for field in fields(ScheduleConfig)}
    assert all(text and "\n" not in text for text in documented.values())


def test_the_names_of_the_configuration_are_those_of_the_table() -> None:
    assert set(get_args(ScheduleName)) == set(SCHEDULES)


def test_reading_a_schedule_does_not_import_jax() -> None:
    code = "import sys, tjx_optim; tjx_optim.ScheduleConfig(); sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
