"""Groups of parameters, written as text: ``"blocks/*/bias: weight_decay=0.1"``.

Standard library only: the configuration reads them without JAX.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

SETTINGS = ("frozen", "learning_rate_scale", "weight_decay")


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """What differs for the parameters whose path matches a pattern.

    Attributes
    ----------
    pattern
        Glob over the whole path; ``*`` crosses ``/``.
    learning_rate_scale
        Factor of the learning rate, and so of decoupled weight decay.
    weight_decay
        Takes the place of the optimizer's, for biases and norm scales too; None keeps the rules.
    frozen
        Whether the parameters never change; they have no moments, nor do their gradients count.
    """

    pattern: str
    learning_rate_scale: float = 1.0
    weight_decay: float | None = None
    frozen: bool = False

    def matches(self, path: str) -> bool:
        """Tell whether a parameter's path matches.

        Examples
        --------
        >>> ParameterGroup(pattern="*/bias").matches("blocks/mlp/up/bias")
        True
        """
        return fnmatchcase(path, self.pattern)


def parse_group(text: str) -> ParameterGroup:
    """Read a group from its text.

    Parameters
    ----------
    text : str
        ``PATTERN: frozen``, or ``PATTERN: learning_rate_scale=0.1 weight_decay=0`` (either or
        both).

    Returns
    -------
    ParameterGroup
        What the text says.

    Raises
    ------
    ValueError
        When it cannot be read: every problem, a line each.

    Examples
    --------
    >>> group = parse_group("wte/*: learning_rate_scale=0.1 weight_decay=0")
    >>> group.pattern, group.learning_rate_scale, group.weight_decay, group.frozen
    ('wte/*', 0.1, 0.0, False)
    """
    pattern, _, rest = (part.strip() for part in text.partition(":"))
    words = rest.split()
    if not (pattern and words):
        raise ValueError(
            f"{text!r}: must be a pattern of paths, a colon and settings, such as "
            "'wte/*: learning_rate_scale=0.1 weight_decay=0' or 'wte/*: frozen'"
        )
    numbers: dict[str, float] = {}
    problems = []
    for word in words:
        name, has_value, value = word.partition("=")
        if name not in SETTINGS or (name == "frozen" and has_value):
            near = get_close_matches(name, SETTINGS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(SETTINGS)}"
            problems.append(f"{text!r}: there is no setting {word!r}; {hint}")
        elif name in numbers:
            problems.append(f"{text!r}: {name} is given twice: keep one")
        else:
            numbers[name] = 1.0 if name == "frozen" else _number(value)
            problems += _out_of_range(text, word, name, numbers[name])
    if "frozen" in numbers and len(numbers) > 1:
        problems.append(f"{text!r}: what is frozen has no rate and no decay: keep frozen alone")
    if problems:
        raise ValueError("\n".join(problems))
    return ParameterGroup(
        pattern=pattern,
        learning_rate_scale=numbers.get("learning_rate_scale", 1.0),
        weight_decay=numbers.get("weight_decay"),
        frozen="frozen" in numbers,
    )


def group_of(path: str, groups: Iterable[ParameterGroup]) -> ParameterGroup:
    """Return the first group that a path matches; one that changes nothing where none does."""
    return next((group for group in groups if group.matches(path)), ParameterGroup(pattern="*"))


def unused_groups(paths: Sequence[str], groups: Sequence[ParameterGroup]) -> list[str]:
    """Say of each group that decides about no parameter why, a line each.

    Parameters
    ----------
    paths : sequence of str
        The paths of all parameters.
    groups : sequence of ParameterGroup
        In the order in which they are asked.
    """
    problems = []
    for number, group in enumerate(groups):
        matched = [path for path in paths if group.matches(path)]
        if not matched:
            near = get_close_matches(group.pattern.replace("*", ""), paths, n=3, cutoff=0.0)
            problems.append(
                f"groups: the pattern {group.pattern!r} matches no parameter; the nearest are "
                f"{', '.join(near)}: correct it or take it out"
            )
        elif all(any(g.matches(path) for g in groups[:number]) for path in matched):
            problems.append(
                f"groups: all that the pattern {group.pattern!r} matches is decided by earlier "
                "groups: put it before them or take it out"
            )
    return problems


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _out_of_range(text: str, word: str, name: str, value: float) -> list[str]:
    if math.isfinite(value) and (value > 0 or (value == 0 and name == "weight_decay")):
        return []
    bound = "a finite number of at least 0" if name == "weight_decay" else "finite and above 0"
    more = "; write frozen for what must not change" if value == 0 else ""
    return [f"{text!r}: {word} must be {bound}, such as {name}=0.1{more}"]
