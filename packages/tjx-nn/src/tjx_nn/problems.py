"""Errors of configurations as data: the field and the message. Standard library only."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

# Limits of an error message; a malformed file can have thousands of errors, and huge values.
_MAX_PROBLEMS = 50
_MAX_CHARACTERS = 2000


class Problem(NamedTuple):
    """One error in a configuration, as `tjx_core.Problem`.

    Attributes
    ----------
    path
        Field of the configuration; a dotted path if it is one of a nested configuration.
    message
        ``got <value>; expected <rule>; <how to fix>``.
    related
        Other fields that the problem depends on.
    """

    path: str
    message: str
    related: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class InvalidConfigError(ValueError):
    """All errors of a configuration or another input at once; ``str()`` has a line for each.

    The text has the first 50; the middle of a line of more than 2,000 characters is left out.

    Parameters
    ----------
    problems
        At least one. A str is the message of a problem without a path.

    Attributes
    ----------
    problems : tuple of Problem
        The problems, in the order given.
    """

    def __init__(self, problems: Iterable[Problem | str]) -> None:
        self.problems = tuple(Problem("", p) if isinstance(p, str) else p for p in problems)
        super().__init__(self.problems)  # the arguments with which pickle makes it again

    def __str__(self) -> str:
        half = _MAX_CHARACTERS // 2
        lines = [
            line if len(line) <= _MAX_CHARACTERS else f"{line[:half]} ... {line[-half:]}"
            for line in map(str, self.problems[:_MAX_PROBLEMS])
        ]
        more = len(self.problems) - _MAX_PROBLEMS
        return "\n".join([*lines, *([f"and {more} more"] if more > 0 else [])])


def raise_problems(problems: Sequence[Problem | str]) -> None:
    """Raise `InvalidConfigError` if there are problems."""
    if problems:
        raise InvalidConfigError(problems)


def problems_of(error: ValueError) -> tuple[Problem, ...]:
    """Return the problems of an error; of other errors one for each line, without a path."""
    if isinstance(error, InvalidConfigError):
        return error.problems
    return tuple(Problem("", line) for line in str(error).splitlines())
