"""Environments: episodes of several turns, whose responses get observations and rewards.

Importing it needs only the standard library and tjx_core.
"""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from tjx_rl.verifiers.text import numeric_match


class EnvironmentStep(NamedTuple):
    """Answer of an environment to a response.

    Attributes
    ----------
    observation : str or None
        Text that the model reads before its next response; None if the episode is over.
    reward : float
        Reward of the response; that of an episode is the sum.
    """

    observation: str | None
    reward: float = 0.0


class Environment(Protocol):
    """One episode; its steps must be a function of the responses, so that runs resume exactly."""

    def step(self, response: str) -> EnvironmentStep:
        """Return observation and reward for the next response of the model.

        Parameters
        ----------
        response : str
            Text of the response.

        Returns
        -------
        EnvironmentStep
            Its observation is None if the episode is over.
        """
        ...


# From (prompt, answer) to an episode.
MakeEnvironment = Callable[[str, str], Environment]


class Calculator:
    """A tool: the value of an expression that a response asks for.

    A response with ``<calc>EXPRESSION</calc>`` gets ``=VALUE`` as its observation, or ``=error``.
    Any other response is the final one, with reward 1 if its last number equals the answer.

    Parameters
    ----------
    prompt : str
        The prompt; not used.
    answer : str
        A number.

    Examples
    --------
    >>> episode = Calculator("What is 12 * 12 + 1?", "145")
    >>> episode.step("I compute <calc>12 * 12 + 1</calc>")
    EnvironmentStep(observation='=145', reward=0.0)
    >>> episode.step("It is 145.")
    EnvironmentStep(observation=None, reward=1.0)
    """

    def __init__(self, prompt: str, answer: str) -> None:
        del prompt
        self._answer = answer

    def step(self, response: str) -> EnvironmentStep:
        """Return the value of the first expression, or the reward of a final response.

        Parameters
        ----------
        response : str
            Text of the response.

        Returns
        -------
        EnvironmentStep
            As of `Environment.step`.

        Raises
        ------
        ValueError
            If the answer is not a number.
        """
        call = _CALL.search(response)
        if call is None:
            return EnvironmentStep(None, float(numeric_match(response, self._answer)))
        try:
            value = _evaluate(ast.parse(call[1].strip(), mode="eval").body)
            return EnvironmentStep(f"={value:.10g}" if isinstance(value, float) else f"={value}")
        except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
            return EnvironmentStep("=error")


_CALL = re.compile(r"<calc>([^<]{1,100})</calc>")  # bounds the time and the size of the value
_OPERATORS: Mapping[type, Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip


def _evaluate(node: ast.expr) -> float:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand)
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        number: float = node.value  # type: ignore[assignment]  # as the line above checks
        return number
    raise ValueError(f"got {ast.dump(node)[:50]}; expected numbers with +, -, * and /")


_BUILT_IN: Mapping[str, MakeEnvironment] = {"calculator": Calculator}
registered_environments: dict[str, MakeEnvironment] = dict(_BUILT_IN)
"""Environments by name; `register_environment` adds to them."""


def register_environment(name: str, make: MakeEnvironment) -> None:
    """Add an environment that `RLConfig.environment` selects by name.

    Parameters
    ----------
    name : str
        The name. Registering a name again replaces the entry, unless it is built in.
    make : callable
        From prompt and answer of an example to the `Environment` of one episode.

    Raises
    ------
    ValueError
        If the name is empty or built in.

    Examples
    --------
    >>> register_environment("my_calculator", Calculator)
    >>> registered_environments.pop("my_calculator") is Calculator
    True
    """
    if name in ("", *_BUILT_IN):
        raise ValueError(
            f"name: got {name!r}; expected a name that is not built in "
            f"({', '.join(_BUILT_IN)}); choose another"
        )
    registered_environments[name] = make


def take_step(environment: Environment, response: str) -> tuple[EnvironmentStep, str | None]:
    """Take a step of an environment; an exception in it ends the episode with reward 0.

    Parameters
    ----------
    environment : Environment
        The episode.
    response : str
        Text of the response.

    Returns
    -------
    EnvironmentStep
        The step.
    str or None
        Why the environment failed; None if it did not.
    """
    try:
        observation, reward = environment.step(response)
        return EnvironmentStep(observation, float(reward)), None
    except Exception as error:
        return EnvironmentStep(None), f"{type(error).__name__}: {error}"[:200]
