"""Configuration errors as data: the path of the value and the message."""

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Problem:
    """One error in a configuration or command line.

    Attributes
    ----------
    path : str
        Dotted path of the value, such as ``optimizer.learning_rate``; "" if it is about no value.
    message : str
        ``got <value>; expected <rule>; <how to fix>``.
    related : tuple of str
        Paths of the other values that the problem depends on, such as those it contradicts.

    Examples
    --------
    >>> problem = Problem("n_head", "got 5; expected a divisor of d_model=64", ("d_model",))
    >>> print(problem.within("model"))
    model.n_head: got 5; expected a divisor of d_model=64
    >>> problem.within("model").paths
    ('model.n_head', 'model.d_model')
    """

    path: str
    message: str
    related: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message

    @property
    def paths(self) -> tuple[str, ...]:
        """All paths that the problem is about, its own first; empty without one."""
        return tuple(path for path in (self.path, *self.related) if path)

    def within(self, section: str) -> "Problem":
        """Return the problem with its paths relative to a parent of the section.

        Parameters
        ----------
        section : str
            Name of the section; it becomes the first part of every path.

        Returns
        -------
        Problem
            A problem without a path gets the section itself as its path.
        """
        related = tuple(f"{section}.{path}" for path in self.related)
        return replace(
            self, path=f"{section}.{self.path}" if self.path else section, related=related
        )


class ConfigError(ValueError):
    """All problems of a configuration at once; ``str()`` has a line for each.

    Parameters
    ----------
    problems : iterable of Problem or str
        At least one. A str is the message of a problem without a path.

    Attributes
    ----------
    problems : tuple of Problem
        The problems, in the order given.

    Examples
    --------
    >>> error = ConfigError([Problem("seed", "got -1; expected at least 0"), "give --data"])
    >>> print(error)
    seed: got -1; expected at least 0
    give --data
    >>> [problem.path for problem in error.problems]
    ['seed', '']
    """

    def __init__(self, problems: Iterable[Problem | str]) -> None:
        self.problems = tuple(Problem("", p) if isinstance(p, str) else p for p in problems)
        assert self.problems, "an error without a problem"
        super().__init__(self.problems)  # the arguments with which pickle makes it again

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


def problems_of(error: ValueError) -> tuple[Problem, ...]:
    """Return the problems that an error carries, to report them together with others.

    Parameters
    ----------
    error : ValueError
        A `ConfigError`, an error with the same attribute `problems`, or any other.

    Returns
    -------
    tuple of Problem
        For other errors one problem per line of the text, without a path.

    Examples
    --------
    >>> problems_of(ConfigError([Problem("b1", "got 2.0; expected [0, 1)")]))[0].within("optimizer")
    Problem(path='optimizer.b1', message='got 2.0; expected [0, 1)', related=())
    >>> problems_of(ValueError("no such file"))
    (Problem(path='', message='no such file', related=()),)
    """
    if isinstance(error, ConfigError):
        return error.problems
    if hasattr(error, "problems"):  # of tjx_nn, which does not depend on this package
        return tuple(Problem(each.path, each.message, each.related) for each in error.problems)
    lines = str(error).splitlines() or [type(error).__name__]
    return tuple(Problem("", line) for line in lines)
