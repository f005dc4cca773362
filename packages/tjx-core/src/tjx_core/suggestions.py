"""Suggestions for misspelled names in error messages."""

import difflib
from collections.abc import Iterable

from tjx_core.problems import Problem


def nearest_name(given: str, allowed: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return the allowed name most similar to the given one.

    Parameters
    ----------
    given : str
        The misspelled name.
    allowed : iterable of str
        Names to choose from.
    cutoff : float
        Least similarity in [0, 1], as in `difflib.get_close_matches`.

    Returns
    -------
    str or None
        None if no name is similar enough.

    Examples
    --------
    >>> nearest_name("adamm", ["adamw", "lion"])
    'adamw'
    """
    return next(iter(nearest_names(given, allowed, count=1, cutoff=cutoff)), None)


def nearest_names(
    given: str, allowed: Iterable[str], *, count: int = 3, cutoff: float = 0.6
) -> list[str]:
    """Return the allowed names most similar to the given one, the most similar first.

    Parameters
    ----------
    given, allowed, cutoff
        As in `nearest_name`.
    count : int
        Maximum number of names.

    Returns
    -------
    list of str
        Empty if no name is similar enough.

    Examples
    --------
    >>> nearest_names("adam", ["lion", "adamw", "adamax"])
    ['adamw', 'adamax']
    """
    return difflib.get_close_matches(given, list(allowed), n=count, cutoff=cutoff)


def did_you_mean(given: str, allowed: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return ``"; did you mean NAME?"``, the end of an error message, or "" without a match.

    Parameters
    ----------
    given, allowed, cutoff
        As in `nearest_name`.

    Returns
    -------
    str
        The suggestion with its separator, to be appended to a message.

    Examples
    --------
    >>> did_you_mean("adamm", ["adamw", "lion"])
    '; did you mean adamw?'
    >>> did_you_mean("xyz", ["adamw", "lion"])
    ''
    """
    nearest = nearest_name(given, allowed, cutoff=cutoff)
    return f"; did you mean {nearest}?" if nearest else ""


def unknown_name(
    path: str, given: str, allowed: Iterable[str], *, register: str | None = None
) -> Problem:
    """Return the problem of a value that is none of the allowed names.

    Parameters
    ----------
    path : str
        Argument, flag or dotted path of the value.
    given : str
        The value.
    allowed : iterable of str
        All names that are allowed; the message lists them.
    register : str, optional
        Function that adds a name; the message names it if no allowed name is similar.

    Returns
    -------
    Problem
        Its text ends in the nearest allowed name, if one is similar.

    Examples
    --------
    >>> print(unknown_name("optimizer.name", "adamm", ["adamw", "lion"]))
    optimizer.name: got 'adamm'; expected one of adamw, lion; did you mean adamw?
    >>> print(unknown_name("task", "x", ["causal_lm"], register="tjx_trainer.register_task"))
    task: got 'x'; expected one of causal_lm; add it with tjx_trainer.register_task
    """
    names = list(allowed)
    hint = did_you_mean(given, names)
    if register and not hint:
        hint = f"; add it with {register}"
    expected = f"one of {', '.join(names)}" if names else "a registered name"
    return Problem(path, f"got {given!r}; expected {expected}{hint}")


def unknown_flag(flag: str, known: Iterable[str]) -> Problem:
    """Return the problem of a command-line flag that does not exist.

    Parameters
    ----------
    flag : str
        The flag as given, with its dashes and without a value.
    known : iterable of str
        The flags that exist, with their dashes.

    Returns
    -------
    Problem
        Its path is the flag; its text ends in the nearest flag, if one is similar.

    Examples
    --------
    >>> print(unknown_flag("--stepp", ["--step", "--json"]))
    --stepp: unknown flag; did you mean --step?
    """
    return Problem(flag, f"unknown flag{did_you_mean(flag, known)}")
