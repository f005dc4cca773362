"""Schedule configuration: all problems at once, units of lengths, no import of JAX."""

import subprocess
import sys
from dataclasses import fields
from typing import Any, get_args

import docstring_parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tjx_core import ConfigError
from tjx_optim import SCHEDULES, ScheduleConfig, ScheduleSteps
from tjx_optim.schedule_config import ScheduleName

# A value of each field that is not its default.
GIVEN: dict[str, Any] = {
    "warmup_steps": 3, "warmup_fraction": 0.1, "decay_steps": 90, "decay_fraction": 0.9,
    "cooldown_steps": 5, "cooldown_fraction": 0.5, "cooldown_shape": "sqrt",
    "boundaries": (0.5,), "factors": (0.5,), "final_fraction": 0.0, "start_fraction": 0.5,
}  # fmt: skip


def message(**given: Any) -> str:
    with pytest.raises(ConfigError, match=r".") as raised:
        ScheduleConfig(**given)
    return str(raised.value)


def test_an_unknown_schedule_lists_the_known_ones() -> None:
    # In a subprocess: in this one the test suite's type checker would reject the shape first.
    code = "from tjx_optim import ScheduleConfig; ScheduleConfig(name='adm', cooldown_shape='x')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    name, shape = run.stderr.splitlines()[-2:]
    known = "constant, linear, cosine, inverse_sqrt, wsd, one_cycle, piecewise"
    assert f"ConfigError: name: got 'adm'; expected one of {known}; add it with" in name
    assert shape == "cooldown_shape: got 'x'; expected one of linear, cosine, sqrt"


def test_configuration_and_table_have_the_same_names() -> None:
    assert set(get_args(ScheduleName)) == set(SCHEDULES)


# Fields that each schedule uses beside its warm-up.
USED = {
    "constant": "",
    "linear": "decay_steps decay_fraction final_fraction",
    "cosine": "decay_steps decay_fraction final_fraction",
    "inverse_sqrt": "",
    "wsd": "decay_steps decay_fraction final_fraction cooldown_steps cooldown_fraction "
    "cooldown_shape",
    "one_cycle": "decay_steps decay_fraction final_fraction start_fraction",
    "piecewise": "boundaries factors",
}


def uses(name: str, field: str) -> bool:
    return field in f"warmup_steps warmup_fraction {USED[name]}".split()


@pytest.mark.parametrize("name", get_args(ScheduleName))
def test_only_unused_fields_raise(name: str) -> None:
    needed = {k: GIVEN[k] for k in ("boundaries", "factors")} if name == "piecewise" else {}
    for field, value in GIVEN.items():
        if uses(name, field):
            config = ScheduleConfig(**{"name": name, **needed, field: value})
            assert getattr(config, field) == value
        else:
            text = message(**{"name": name, **needed, field: value})
            assert text.startswith(f"{field}: got {value}; expected ")
            assert f"{name} does not use it" in text
            assert "\n" not in text


@pytest.mark.parametrize("name", get_args(ScheduleName))
def test_every_used_length_changes_the_steps(name: str) -> None:
    needed = {k: GIVEN[k] for k in ("boundaries", "factors")} if name == "piecewise" else {}

    def steps(**given: Any) -> ScheduleSteps:
        return ScheduleConfig(**{"name": name, **needed, **given}).in_steps(100)

    for field, value in GIVEN.items():
        is_length = field.partition("_")[0] in ("warmup", "decay", "cooldown")
        if is_length and field != "cooldown_shape" and uses(name, field):
            assert steps(**{field: value}) != steps()
    if name == "piecewise":
        assert steps(boundaries=(0.7,)) != steps()


@pytest.mark.parametrize("length", ["warmup", "decay", "cooldown"])
def test_duplicate_lengths_raise(length: str) -> None:
    given = {name: GIVEN[name] for name in (f"{length}_steps", f"{length}_fraction")}
    assert "expected one of the two; leave one out" in message(name="wsd", **given)


@pytest.mark.parametrize(
    ("field", "wrong", "right"),
    [
        ("warmup_steps", [-1, 2**31], [0, 2**31 - 1]),
        ("decay_steps", [0, -3, 2**31], [1]),
        ("cooldown_steps", [0, -3, 2**31], [1]),
        ("warmup_fraction", [-0.1, 1.0, float("nan")], [0.0, 0.7]),
        ("decay_fraction", [0.0, 1.1, float("nan")], [0.5, 1.0]),
        ("cooldown_fraction", [0.0, 1.1, float("inf")], [0.1, 1.0]),
        ("final_fraction", [-0.1, 1.1, float("nan"), float("inf")], [0.0, 1.0]),
    ],
)
def test_values_out_of_range_raise(field: str, wrong: list[Any], right: list[Any]) -> None:
    for value in wrong:
        assert message(name="wsd", **{field: value}).startswith(f"{field}: got {value}; expected ")
    for value in right:
        ScheduleConfig(**{"name": "wsd", field: value})


def test_the_start_of_one_cycle_is_a_fraction_of_the_peak() -> None:
    assert message(name="one_cycle", start_fraction=1.5).startswith("start_fraction: got 1.5; exp")


def test_all_problems_of_a_schedule_are_reported_together() -> None:
    given = {"warmup_steps": -1, "final_fraction": 2.0, "cooldown_steps": 5, "factors": (0.5,)}
    lines = message(name="linear", **given).splitlines()
    assert {line.partition(":")[0] for line in lines} == set(given)


def test_a_decay_that_ends_within_the_warm_up_raises() -> None:
    assert "more than warmup_steps=10" in message(warmup_steps=10, decay_steps=10)
    ScheduleConfig(warmup_steps=10, decay_steps=11)
    assert "more than warmup_fraction=0.3" in message(warmup_fraction=0.3, decay_fraction=0.3)
    assert "more than warmup_fraction=0.3" in message(name="one_cycle", decay_fraction=0.2)
    ScheduleConfig(warmup_fraction=0.3, decay_fraction=0.31)


def test_a_cool_down_that_overlaps_the_warm_up_raises() -> None:
    text = message(name="wsd", warmup_steps=10, decay_steps=100, cooldown_steps=91)
    assert text.startswith("cooldown_steps: got 91; expected at most the 90 steps")
    ScheduleConfig(name="wsd", warmup_steps=10, decay_steps=100, cooldown_steps=90)

    assert "(0.6 of the run)" in message(name="wsd", warmup_fraction=0.6, cooldown_fraction=0.5)
    assert "cooldown_fraction: got 0.2" in message(name="wsd", warmup_fraction=0.9)
    # 0.1 + 0.2 is 0.30000000000000004 in float64, and fits.
    parts: Any = {"warmup_fraction": 0.1, "cooldown_fraction": 0.2, "decay_fraction": 0.3}
    ScheduleConfig(name="wsd", **parts)


def test_phases_that_overlap_in_a_run_raise_with_both_numbers() -> None:
    with pytest.raises(
        ValueError, match="got 60 steps in a run of max_steps=100; expected at most the 50"
    ):
        ScheduleConfig(name="wsd", warmup_steps=50, cooldown_steps=60).in_steps(100)
    with pytest.raises(
        ValueError, match=r"got step 20 as the end of the decay .* more than the 50 steps"
    ):
        ScheduleConfig(warmup_fraction=0.5, decay_steps=20).in_steps(100)
    with pytest.raises(
        ValueError, match=r"got step 20 as the end of the decay .* more than the 30 steps"
    ):
        ScheduleConfig(name="one_cycle", decay_steps=20).in_steps(100)
    piecewise = ScheduleConfig(
        name="piecewise", warmup_steps=50, boundaries=(0.2, 0.5), factors=(0.5, 0.1)
    )
    with pytest.raises(ValueError, match=r"got step 20 as the first .* expected at least step 50"):
        piecewise.in_steps(100)
    assert piecewise.in_steps(1000).boundaries == (200, 500)
    # The run ends with the warm-up, so later phases are not checked.
    assert piecewise.in_steps(50).warmup == 50


def test_invalid_pieces_raise() -> None:
    def wrong(boundaries: tuple[int | float, ...], factors: tuple[float, ...], **given: Any) -> str:
        return message(name="piecewise", boundaries=boundaries, factors=factors, **given)

    assert "expected some for piecewise" in wrong((), ())
    assert "expected 1 of them, one for each of boundaries=(5,)" in wrong((5,), (0.5, 0.1))
    assert "all in steps or all in fractions" in wrong((0.5, 900), (0.5, 0.1))
    assert "expected increasing" in wrong((5, 5), (0.5, 0.1))
    assert "expected increasing" in wrong((0.8, 0.5), (0.5, 0.1))
    assert "more than warmup_steps=5" in wrong((5,), (0.5,), warmup_steps=5)
    assert "at least warmup_fraction=0.2" in wrong((0.1,), (0.5,), warmup_fraction=0.2)
    for at in (0, -1, 0.0, 1.0, 100.0, 2**31, float("nan")):
        assert wrong((at,), (0.5,)).startswith(f"boundaries: got {at}; expected a step")
    for factor in (-0.1, 1.5, float("nan")):
        assert wrong((5,), (factor,)).startswith(f"factors: got {factor}; expected [0, 1]")


@settings(max_examples=50)
@given(warmup=st.integers(0, 99), cooldown=st.integers(1, 100), max_steps=st.integers(100, 999))
def test_equal_lengths_in_steps_and_fractions_give_equal_steps(
    warmup: int, cooldown: int, max_steps: int
) -> None:
    if warmup + cooldown > max_steps:
        return
    steps = ScheduleConfig(name="wsd", warmup_steps=warmup, cooldown_steps=cooldown)
    parts = ScheduleConfig(
        name="wsd",
        warmup_fraction=round(warmup / max_steps, 5),
        cooldown_fraction=round(cooldown / max_steps, 5),
    )
    want = ScheduleSteps(warmup=warmup, decay=max_steps - cooldown, end=max_steps, boundaries=())
    assert steps.in_steps(max_steps) == parts.in_steps(max_steps) == want


def test_a_schedule_without_an_end_does_not_depend_on_the_run_length() -> None:
    for name in ("constant", "inverse_sqrt"):
        config = ScheduleConfig(name=name, warmup_steps=5)
        assert config.in_steps(10) == config.in_steps(1000)
        assert config.in_steps(10).end is None
    ended = ScheduleConfig(decay_steps=10)
    assert ended.in_steps(10) == ended.in_steps(1000)
    assert ended.in_steps(10).end == 10


def test_each_field_of_a_schedule_has_a_one_line_description() -> None:
    parsed = docstring_parser.parse(ScheduleConfig.__doc__ or "")
    documented = {p.arg_name: p.description for p in parsed.params}
    assert set(documented) == {field.name for field in fields(ScheduleConfig)}
    assert all(text and "\n" not in text for text in documented.values())


def test_the_schedule_configuration_does_not_import_jax() -> None:
    code = "import sys, tjx_optim; tjx_optim.ScheduleConfig(); sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
