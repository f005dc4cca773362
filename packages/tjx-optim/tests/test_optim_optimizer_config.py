"""Optimizer configuration: all problems at once, defaults, no import of JAX."""

import subprocess
import sys
from dataclasses import fields
from typing import Any, get_args

import docstring_parser
import pytest

from tjx_core import ConfigError
from tjx_optim import OPTIMIZERS, OptimizerConfig
from tjx_optim.optimizer_config import DEFAULTS, OptimizerName


def test_all_problems_of_an_optimizer_are_reported_together() -> None:
    with pytest.raises(ConfigError, match="learning_rate: got -1") as error:
        OptimizerConfig(
            learning_rate=-1.0, b1=1.0, b2=-0.1, eps=0.0, clip_norm=0.0, weight_decay=-1.0
        )
    assert [problem.path for problem in error.value.problems] == [
        "learning_rate",
        "weight_decay",
        "b1",
        "b2",
        "eps",
        "clip_norm",
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"momentum": 0.9},
            r"momentum: got 0.9; .* adamw does not use it \(only sgd, muon, dion do\)",
        ),
        ({"nesterov": False}, "nesterov: got False; .* adamw does not use it"),
        ({"name": "sgd", "b1": 0.9}, "b1: got 0.9; .* sgd does not use it"),
        ({"name": "sgd", "b2": 0.9}, "b2: got 0.9; .* sgd does not use it"),
        ({"name": "lion", "eps": 1e-8}, "eps: got 1e-08; .* lion does not use it"),
        (
            {"name": "sgd", "nesterov": True, "momentum": 0.0},
            "nesterov: got True; .* without momentum",
        ),
        ({"name": "adam", "cautious_decay": True}, "cautious_decay: got True; .* use adamw"),
        ({"polar_express": True}, "polar_express: got True; .* adamw does not use it"),
        ({"name": "schedule_free_adamw", "b1": 0.0}, "b1: got 0.0; .* divides by it"),
        ({"name": "schedule_free_adamw", "ema_decay": 0.9}, "averages the parameters itself"),
        ({"name": "adafactor", "b2": 0.0}, "b2: got 0.0; .* adafactor's decay rate"),
        ({"name": "dion", "rank_fraction": 0.0}, r"rank_fraction: got 0.0; expected \(0, 1\]"),
        ({"name": "soap", "precondition_every": 0}, "precondition_every: got 0; expected at least"),
        ({"name": "soap", "moment_dtype": "bfloat16"}, "moment_dtype: .* eigenvectors"),
        ({"ema_decay": 1.0}, r"ema_decay: got 1.0; expected \[0, 1\)"),
        ({"momentum": -0.1, "name": "sgd"}, r"momentum: got -0.1; expected \[0, 1\)"),
        ({"clip_value": 0.0}, "clip_value: got 0.0; expected a finite number above 0"),
        ({"clip_adaptive": -1.0}, "clip_adaptive: got -1.0; expected a finite number above 0"),
    ],
)
def test_unused_settings_and_contradictions_raise(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        OptimizerConfig(**given)
    assert len(error.value.problems) == 1


@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_missing_settings_have_the_optimizers_defaults(name: Any) -> None:
    assert OptimizerConfig(name=name).settings == dict(DEFAULTS[name])
    assert OptimizerConfig(name=name, weight_decay=0.7).settings == {
        **DEFAULTS[name],
        "weight_decay": 0.7,
    }


def test_zero_and_false_override_the_defaults() -> None:
    given = OptimizerConfig(name="muon", nesterov=False, b1=0.0, momentum=0.0).settings
    assert (given["nesterov"], given["b1"], given["momentum"]) == (False, 0.0, 0.0)


def test_an_unknown_optimizer_lists_the_known_ones() -> None:
    known = "sgd, adam, adamw, lamb, lion, adafactor, muon, dion, soap, schedule_free_adamw"
    with pytest.raises(ConfigError, match=f"^name: got 'adm'; expected one of {known}.*mean adam"):
        OptimizerConfig(name="adm")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_numbers_raise(value: float) -> None:
    with pytest.raises(ValueError, match=r"learning_rate: .*\n.*clip_norm: "):
        OptimizerConfig(learning_rate=value, clip_norm=value)


def test_each_field_has_a_one_line_description() -> None:
    parsed = docstring_parser.parse(OptimizerConfig.__doc__ or "")
    documented = {p.arg_name: p.description for p in parsed.params}
    assert set(documented) == {field.name for field in fields(OptimizerConfig)}
    assert all(text and "\n" not in text for text in documented.values())


def test_configuration_and_table_have_the_same_names() -> None:
    assert set(get_args(OptimizerName)) == set(OPTIMIZERS)


def test_the_configuration_does_not_import_jax() -> None:
    code = "import sys, tjx_optim; tjx_optim.OptimizerConfig(); sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
