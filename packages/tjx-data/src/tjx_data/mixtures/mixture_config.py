"""Mixtures of corpora as text: names, weights, and weights that change at given steps."""

import math
from collections.abc import Mapping

from tjx_core import Problem, problems_of
from tjx_data.corpora.registry import find_corpus, is_corpus

Weights = dict[str, float]


def parse_mixture(
    mixture: str, *, setting: str = "mixture", weighted: bool = True
) -> tuple[Weights, list[Problem]]:
    """Return the weights of a mixture, and a problem for each invalid entry.

    Parameters
    ----------
    mixture : str
        Entries NAME=WEIGHT, separated by commas.
    setting : str
        Name of the setting in problems.
    weighted : bool
        Whether entries have weights; otherwise they are names, whose weight is 1.
    """
    found: Weights = {}
    problems = []
    for entry in mixture.split(","):
        name, equals, weight = (part.strip() for part in entry.rpartition("="))
        number = _number(weight)
        if not weighted:
            if math.isnan(number):
                name, equals, number = entry.strip(), "=", 1.0
            else:
                message = f"got {entry!r}; expected NAME without a weight, which its size gives"
                problems.append(Problem(setting, message, ("mixture_temperature",)))
                continue
        if not (equals and name and math.isfinite(number) and number > 0):
            message = (
                f"got {entry!r}; expected NAME=WEIGHT with a weight above 0, such as "
                "'fineweb-edu=0.8,books/*.txt=0.2'"
            )
            problems.append(Problem(setting, message))
        elif name in found:
            problems.append(Problem(setting, f"got {name!r} twice; expected one weight"))
        else:
            found[name] = number
    return found, problems


def parse_curriculum(curriculum: str) -> tuple[dict[int, Weights], list[Problem]]:
    """Return the weights from given steps on, and a problem for each invalid entry.

    Parameters
    ----------
    curriculum : str
        Entries STEP:MIXTURE, separated by semicolons, in the order of the steps.

    Examples
    --------
    >>> parse_curriculum("100:web=1,books=1; 900:books=1")[0]
    {100: {'web': 1.0, 'books': 1.0}, 900: {'books': 1.0}}
    """
    found: dict[int, Weights] = {}
    problems = []
    for entry in curriculum.split(";"):
        step, _, mixture = entry.partition(":")
        number = int(step) if step.strip().isdecimal() else 0
        if number <= max(found, default=0) or not mixture.strip():
            message = (
                f"got {entry!r}; expected STEP:NAME=WEIGHT,... with ascending steps above 0, such "
                "as '1000:web=0.5,books=0.5;9000:books=1'"
            )
            problems.append(Problem("curriculum", message))
            continue
        found[number], wrong = parse_mixture(mixture, setting="curriculum")
        problems += wrong
    return found, problems


def validate_names(names: Mapping[str, str], token_suffixes: tuple[str, ...]) -> list[Problem]:
    """Return a problem for each name that cannot be part of a mixture.

    Parameters
    ----------
    names : mapping
        The setting that has each name.
    token_suffixes : tuple of str
        Suffixes of files of token ids, which are no part of mixtures.
    """
    problems = []
    for name, setting in names.items():
        if name.endswith(token_suffixes):
            message = f"got {name!r}; expected text; give files of token ids by data.path"
            problems.append(Problem(setting, message))
        # Names that look like paths are checked when the files are opened.
        if is_corpus(name) or not any(mark in name for mark in "/.*\\"):
            try:
                find_corpus(name)
            except ValueError as error:
                problems += [Problem(setting, each.message) for each in problems_of(error)]
    return problems


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
