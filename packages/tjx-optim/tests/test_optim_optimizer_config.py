"""Everything wrong with an optimizer is said at once, and reading it needs no JAX."""

import subprocess
import sys
from dataclasses import fields
from typing import Any, get_args

import docstring_parser
import pytest

from tjx_optim import OPTIMIZERS, OptimizerConfig
from tjx_optim.optimizer_config import DEFAULTS, OptimizerName


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
    ("given", "said"),
    [
        ({"momentum": 0.9}, "momentum=0.9: adamw has none, only sgd, muon; leave it out"),
        ({"nesterov": False}, "nesterov=False: adamw has none, only sgd, muon"),
        ({"name": "sgd", "b1": 0.9}, "b1=0.9: sgd has none, only adam, adamw"),
        ({"name": "sgd", "b2": 0.9}, "b2=0.9: sgd has none, only adam, adamw"),
        ({"name": "lion", "eps": 1e-8}, "eps=1e-08: lion has none, only adam, adamw"),
        ({"name": "sgd", "nesterov": True, "momentum": 0.0}, "nesterov=True: needs a momentum"),
        ({"name": "schedule_free_adamw", "b1": 0.0}, "b1=0.0: .* divides by it"),
        ({"name": "schedule_free_adamw", "ema_decay": 0.9}, "a running mean of its own"),
        ({"name": "adafactor", "b2": 0.0}, "b2=0.0: adafactor's decay rate"),
        ({"ema_decay": 1.0}, r"ema_decay=1.0: must lie in \[0, 1\)"),
        ({"momentum": -0.1, "name": "sgd"}, r"momentum=-0.1: must lie in \[0, 1\)"),
        ({"clip_value": 0.0}, "clip_value=0.0: must be finite and above 0"),
        ({"clip_adaptive": -1.0}, "clip_adaptive=-1.0: must be finite and above 0"),
    ],
)
def test_what_an_optimizer_does_not_heed_or_cannot_do_is_refused(given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        OptimizerConfig(**given)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_what_is_left_out_takes_the_optimizers_own_default(name: Any) -> None:
    assert OptimizerConfig(name=name).settings == dict(DEFAULTS[name])
    assert OptimizerConfig(name=name, weight_decay=0.7).settings == {
        **DEFAULTS[name],
        "weight_decay": 0.7,
    }


def test_zero_and_false_are_given_values() -> None:
    given = OptimizerConfig(name="muon", nesterov=False, b1=0.0, momentum=0.0).settings
    assert (given["nesterov"], given["b1"], given["momentum"]) == (False, 0.0, 0.0)


def test_an_unknown_optimizer_lists_the_known_ones() -> None:
    # In a process of its own: here the test suite's type checker would refuse the name first.
    code = "from tjx_optim import OptimizerConfig; OptimizerConfig(name='adm')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    known = "sgd, adam, adamw, lamb, lion, adafactor, muon, schedule_free_adamw"
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
