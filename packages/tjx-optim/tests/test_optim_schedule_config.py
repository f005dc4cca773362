"""Everything wrong with a schedule is said at once, and reading it needs no JAX."""

import subprocess
import sys
from dataclasses import fields
from typing import Any, get_args

import docstring_parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tjx_optim import SCHEDULES, ScheduleConfig, ScheduleSteps
from tjx_optim.schedule_config import ScheduleName

# A value of each field that is not its default.
GIVEN: dict[str, Any] = {
    "warmup_steps": 3, "warmup_fraction": 0.1, "decay_steps": 90, "decay_fraction": 0.9,
    "cooldown_steps": 5, "cooldown_fraction": 0.5, "cooldown_shape": "sqrt",
    "boundaries": (0.5,), "factors": (0.5,), "final_fraction": 0.0, "start_fraction": 0.5,
}  # fmt: skip


def refusal(**given: Any) -> str:
    with pytest.raises(ValueError, match=r".") as refused:
        ScheduleConfig(**given)
    return str(refused.value)


def test_an_unknown_schedule_lists_the_known_ones() -> None:
    # In a process of its own: here the test suite's type checker would refuse the name first.
    code = "from tjx_optim import ScheduleConfig; ScheduleConfig(name='adm', cooldown_shape='x')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    name, shape = run.stderr.splitlines()[-2:]
    known = "constant, linear, cosine, inverse_sqrt, wsd, one_cycle, piecewise"
    assert name.startswith(f"ValueError: name='adm': must be one of {known}")
    assert shape.startswith("cooldown_shape='x': must be one of linear, cosine, sqrt")


def test_the_names_of_the_configuration_are_those_of_the_table() -> None:
    assert set(get_args(ScheduleName)) == set(SCHEDULES)


# What each schedule heeds beside its warm-up.
HEEDS = {
    "constant": "",
    "linear": "decay_steps decay_fraction final_fraction",
    "cosine": "decay_steps decay_fraction final_fraction",
    "inverse_sqrt": "",
    "wsd": "decay_steps decay_fraction final_fraction cooldown_steps cooldown_fraction "
    "cooldown_shape",
    "one_cycle": "decay_steps decay_fraction final_fraction start_fraction",
    "piecewise": "boundaries factors",
}


def heeds(name: str, field: str) -> bool:
    return field in f"warmup_steps warmup_fraction {HEEDS[name]}".split()


@pytest.mark.parametrize("name", get_args(ScheduleName))
def test_what_a_schedule_does_not_heed_is_refused_and_the_rest_is_not(name: str) -> None:
    needed = {k: GIVEN[k] for k in ("boundaries", "factors")} if name == "piecewise" else {}
    for field, value in GIVEN.items():
        if heeds(name, field):
            config = ScheduleConfig(**{"name": name, **needed, field: value})
            assert getattr(config, field) == value
        else:
            message = refusal(**{"name": name, **needed, field: value})
            assert message.startswith(f"{field}={value}: is not heeded by name={name}")
            assert "\n" not in message


@pytest.mark.parametrize("name", get_args(ScheduleName))
def test_every_length_that_is_heeded_turns_the_schedule_elsewhere(name: str) -> None:
    needed = {k: GIVEN[k] for k in ("boundaries", "factors")} if name == "piecewise" else {}

    def steps(**given: Any) -> ScheduleSteps:
        return ScheduleConfig(**{"name": name, **needed, **given}).in_steps(100)

    for field, value in GIVEN.items():
        is_length = field.partition("_")[0] in ("warmup", "decay", "cooldown")
        if is_length and field != "cooldown_shape" and heeds(name, field):
            assert steps(**{field: value}) != steps()
    if name == "piecewise":
        assert steps(boundaries=(0.7,)) != steps()


@pytest.mark.parametrize("length", ["warmup", "decay", "cooldown"])
def test_a_length_is_given_once(length: str) -> None:
    given = {name: GIVEN[name] for name in (f"{length}_steps", f"{length}_fraction")}
    assert "is given twice; leave one of them out" in refusal(name="wsd", **given)


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
def test_a_value_out_of_its_range_is_refused(
    field: str, wrong: list[Any], right: list[Any]
) -> None:
    for value in wrong:
        assert refusal(name="wsd", **{field: value}).startswith(f"{field}={value}: must ")
    for value in right:
        ScheduleConfig(**{"name": "wsd", field: value})


def test_the_start_of_one_cycle_is_a_fraction_of_the_peak() -> None:
    assert refusal(name="one_cycle", start_fraction=1.5).startswith("start_fraction=1.5: must lie")


def test_all_that_is_wrong_is_said_at_once() -> None:
    given = {"warmup_steps": -1, "final_fraction": 2.0, "cooldown_steps": 5, "factors": (0.5,)}
    lines = refusal(name="linear", **given).splitlines()
    assert {line.partition("=")[0] for line in lines} == set(given)


def test_a_decay_that_ends_within_the_warm_up_is_refused() -> None:
    assert "above warmup_steps=10" in refusal(warmup_steps=10, decay_steps=10)
    ScheduleConfig(warmup_steps=10, decay_steps=11)
    assert "above warmup_fraction=0.3" in refusal(warmup_fraction=0.3, decay_fraction=0.3)
    assert "above warmup_fraction=0.3" in refusal(name="one_cycle", decay_fraction=0.2)
    ScheduleConfig(warmup_fraction=0.3, decay_fraction=0.31)


def test_a_cool_down_longer_than_what_the_warm_up_leaves_is_refused() -> None:
    message = refusal(name="wsd", warmup_steps=10, decay_steps=100, cooldown_steps=91)
    assert message.startswith("cooldown_steps=91: must be at most the 90 steps")
    ScheduleConfig(name="wsd", warmup_steps=10, decay_steps=100, cooldown_steps=90)

    assert "(0.6 of the run)" in refusal(name="wsd", warmup_fraction=0.6, cooldown_fraction=0.5)
    assert "cooldown_fraction=0.2" in refusal(name="wsd", warmup_fraction=0.9)
    # 0.1 + 0.2 is 0.30000000000000004 in float64, and fits all the same.
    parts: Any = {"warmup_fraction": 0.1, "cooldown_fraction": 0.2, "decay_fraction": 0.3}
    ScheduleConfig(name="wsd", **parts)


def test_what_does_not_fit_into_the_run_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="max_steps=100 the cool-down takes 60 steps and 50 are"):
        ScheduleConfig(name="wsd", warmup_steps=50, cooldown_steps=60).in_steps(100)
    with pytest.raises(ValueError, match="ends at step 20 and the warm-up at step 50"):
        ScheduleConfig(warmup_fraction=0.5, decay_steps=20).in_steps(100)
    with pytest.raises(ValueError, match="ends at step 20 and the warm-up at step 30"):
        ScheduleConfig(name="one_cycle", decay_steps=20).in_steps(100)
    piecewise = ScheduleConfig(
        name="piecewise", warmup_steps=50, boundaries=(0.2, 0.5), factors=(0.5, 0.1)
    )
    with pytest.raises(ValueError, match="first is step 20 and the warm-up ends at step 50"):
        piecewise.in_steps(100)
    assert piecewise.in_steps(1000).boundaries == (200, 500)
    # As long as the warm-up, and not looked at beyond.
    assert piecewise.in_steps(50).warmup == 50


def test_pieces_must_be_told_apart() -> None:
    def wrong(boundaries: tuple[int | float, ...], factors: tuple[float, ...], **given: Any) -> str:
        return refusal(name="piecewise", boundaries=boundaries, factors=factors, **given)

    assert "piecewise needs some" in wrong((), ())
    assert "as many as boundaries=(5,), 1 and not 2" in wrong((5,), (0.5, 0.1))
    assert "all in steps or all in fractions" in wrong((0.5, 900), (0.5, 0.1))
    assert "must increase" in wrong((5, 5), (0.5, 0.1))
    assert "must increase" in wrong((0.8, 0.5), (0.5, 0.1))
    assert "must be above warmup_steps=5" in wrong((5,), (0.5,), warmup_steps=5)
    assert "must not lie in the warm-up" in wrong((0.1,), (0.5,), warmup_fraction=0.2)
    for at in (0, -1, 0.0, 1.0, 100.0, 2**31, float("nan")):
        assert wrong((at,), (0.5,)).startswith(f"boundaries={at}: must be a step")
    for factor in (-0.1, 1.5, float("nan")):
        assert wrong((5,), (factor,)).startswith(f"factors={factor}: must lie in [0, 1]")


@settings(max_examples=50, deadline=None)
@given(warmup=st.integers(0, 99), cooldown=st.integers(1, 100), max_steps=st.integers(100, 999))
def test_the_same_lengths_in_steps_and_in_fractions_are_the_same_schedule(
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


def test_a_schedule_without_an_end_is_the_same_in_a_longer_run() -> None:
    for name in ("constant", "inverse_sqrt"):
        config = ScheduleConfig(name=name, warmup_steps=5)
        assert config.in_steps(10) == config.in_steps(1000)
        assert config.in_steps(10).end is None
    ended = ScheduleConfig(decay_steps=10)
    assert ended.in_steps(10) == ended.in_steps(1000)
    assert ended.in_steps(10).end == 10


def test_each_field_has_one_line_for_the_help() -> None:
    parsed = docstring_parser.parse(ScheduleConfig.__doc__ or "")
    documented = {p.arg_name: p.description for p in parsed.params}
    assert set(documented) == {field.name for field in fields(ScheduleConfig)}
    assert all(text and "\n" not in text for text in documented.values())


def test_reading_a_schedule_does_not_import_jax() -> None:
    code = "import sys, tjx_optim; tjx_optim.ScheduleConfig(); sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
