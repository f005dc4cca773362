"""Verdicts on the responses of a batch: a verifier never ends a run."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from tjx_core import did_you_mean
from tjx_rl.verifiers.json_schema import matches_schema
from tjx_rl.verifiers.sandbox import SandboxError, passes_tests, regex_matches
from tjx_rl.verifiers.text import exact_match, numeric_match

Verifier = Callable[[str, str], bool]

VERIFIERS: Mapping[str, Verifier] = {
    "numeric": numeric_match,
    "exact": exact_match,
    "regex": regex_matches,
    "json_schema": matches_schema,
    "unit_tests": passes_tests,
}
"""Built-in verifiers by name: functions from (response, answer) to whether it passes."""


class Verdict(NamedTuple):
    """Result of a verifier for one response.

    Attributes
    ----------
    score : float
        1 if the response passed, else 0.
    failure : str or None
        Why the verifier itself failed, such as a time limit; None if it decided.
    """

    score: float
    failure: str | None = None


def verify(
    verifier: str | Verifier, responses: Sequence[str], answers: Sequence[str]
) -> list[Verdict]:
    """Score responses; a verifier that raises, hangs or writes too much scores 0.

    Parameters
    ----------
    verifier : str or callable
        A name of `VERIFIERS`, or a function from (response, answer) to whether it passes.
    responses : sequence of str
        Text of each response.
    answers : sequence of str
        The answer, pattern, schema or tests for each response.

    Returns
    -------
    list of Verdict
        One for each response, in order.

    Raises
    ------
    ValueError
        If the name is unknown.

    Examples
    --------
    >>> verify("numeric", ["12 + 30 = 42", "41"], ["42", "42"])
    [Verdict(score=1.0, failure=None), Verdict(score=0.0, failure=None)]
    """
    if isinstance(verifier, str):
        if verifier not in VERIFIERS:
            raise ValueError(
                f"verifier: got {verifier!r}; expected one of {', '.join(VERIFIERS)}"
                f"{did_you_mean(verifier, VERIFIERS)}"
            )
        verifier = VERIFIERS[verifier]
    return [_verdict(verifier, *pair) for pair in zip(responses, answers, strict=True)]


def _verdict(verifier: Verifier, response: str, answer: str) -> Verdict:
    try:
        return Verdict(float(verifier(response, answer)))
    except SandboxError as error:
        return Verdict(0.0, str(error))
    except (Exception, RecursionError) as error:
        return Verdict(0.0, f"{type(error).__name__}: {error}"[:200])
