"""Identification of languages by a function that the caller names."""

import importlib
from collections.abc import Callable
from functools import cache

Identify = Callable[[str], tuple[str, float]]


@cache
def find_identifier(name: str) -> Identify:
    """Return the function of a name.

    Parameters
    ----------
    name : str
        ``module:function``; the module is imported.

    Returns
    -------
    Callable
        From a text to (language, probability).

    Raises
    ------
    ValueError
        If there is no such module or function.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"language_identifier: got {name!r} ({error}); expected module:function of a module "
            "that Python finds; set PYTHONPATH to its folder"
        ) from error
    if not callable(found):
        raise ValueError(
            f"language_identifier: got {name!r}, a {type(found).__name__}; expected a function"
        )
    identify: Identify = found
    return identify


def is_in_languages(
    text: str, identify: Identify, languages: tuple[str, ...], min_score: float
) -> bool:
    """Return whether a text is in one of some languages.

    Parameters
    ----------
    text : str
        The document.
    identify : Callable
        From `find_identifier`.
    languages : tuple of str
        Languages as `identify` names them.
    min_score : float
        Smallest probability.

    Raises
    ------
    ValueError
        If the function returns anything but a name and a number.

    Examples
    --------
    >>> is_in_languages("Guten Tag", lambda text: ("de", 0.9), ("de", "fr"), 0.65)
    True
    """
    match identify(text):
        case (str(language), float() | int() as score):
            return language in languages and score >= min_score
        case other:
            raise ValueError(
                f"language_identifier: got {other!r} for a text; expected (language, probability)"
            )
