"""Environments: values of the calculator, and failures that end an episode."""

import pytest

from tjx_rl import EnvironmentStep, RLConfig, register_environment, take_step
from tjx_rl.environments import Calculator


@pytest.mark.parametrize(
    ("response", "observation"),
    [
        ("<calc>12 * (3 + 4)</calc>", "=84"),
        ("first <calc>-7/2</calc> then <calc>1</calc>", "=-3.5"),
        ("<calc>1/0</calc>", "=error"),
        ("<calc>2 +</calc>", "=error"),
        ("<calc>9**9**9</calc>", "=error"),
        ("<calc>__import__('os')</calc>", "=error"),
        ("<calc>True + 1</calc>", "=error"),
        ("<calc>" + "(" * 99 + "</calc>", "=error"),
        ("<calc>" + "9*" * 45 + "9</calc>", f"={9**46}"),
        ("<calc>" + "1e200*" * 3 + "1</calc>", "=inf"),
    ],
)
def test_the_calculator_computes_what_a_response_asks_for(response: str, observation: str) -> None:
    assert Calculator("", "1").step(response) == EnvironmentStep(observation)


def test_the_calculator_rewards_the_final_number() -> None:
    too_long = "<calc>" + "8" * 101 + "</calc>"
    for response, reward in (("84 or 85", 1.0), ("84", 0.0), (too_long, 0.0)):
        assert Calculator("", "85").step(response) == EnvironmentStep(None, reward)


def test_an_environment_that_raises_ends_the_episode() -> None:
    step, failure = take_step(Calculator("", "no number"), "85")
    assert step == EnvironmentStep(None)
    assert failure is not None
    assert failure.startswith("ValueError: answer: got 'no number'")


def test_an_environment_is_selected_by_its_name() -> None:
    with pytest.raises(ValueError, match="environment: got 'mine'; expected one of none, calcul"):
        RLConfig(environment="mine")
    with pytest.raises(ValueError, match="name: got ''"):
        register_environment("", Calculator)
    with pytest.raises(ValueError, match="got 'calculator'; expected a name that is not built in"):
        register_environment("calculator", Calculator)
