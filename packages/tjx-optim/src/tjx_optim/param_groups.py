"""Parameter groups, written as text: ``"blocks/*/bias: weight_decay=0.1"``.

Standard library only, so that the configuration is read without JAX.
"""

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase

from tjx_core import ConfigError, did_you_mean

SETTINGS = ("frozen", "learning_rate_scale", "weight_decay")


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Settings of the parameters whose path matches a pattern.

    Attributes
    ----------
    pattern
        Glob over the whole path; ``*`` crosses ``/``.
    learning_rate_scale
        Factor of the learning rate, and so of decoupled weight decay.
    weight_decay
        Replaces the optimizer's weight decay, for biases and norm scales too; None: no change.
    frozen
        Whether the parameters are not trained: no updates, no moments, and their gradients do not
        count in the global norm.
    """

    pattern: str
    learning_rate_scale: float = 1.0
    weight_decay: float | None = None
    frozen: bool = False

    def matches(self, path: str) -> bool:
        """Return whether the pattern matches the path of a parameter.

        Examples
        --------
        >>> ParameterGroup(pattern="*/bias").matches("blocks/mlp/up/bias")
        True
        """
        return fnmatchcase(path, self.pattern)


_MAX_QUOTED = 200  # characters of a text in a message
# Of parameters that no pattern matches.
NO_GROUP = ParameterGroup(pattern="*")


def parse_group(text: str) -> ParameterGroup:
    """Parse a parameter group.

    Parameters
    ----------
    text : str
        ``PATTERN: frozen``, or ``PATTERN: learning_rate_scale=0.1 weight_decay=0`` (either or
        both).

    Returns
    -------
    ParameterGroup
        The group.

    Raises
    ------
    ConfigError
        If the text cannot be parsed or a value is out of range; lists all problems.

    Examples
    --------
    >>> group = parse_group("wte/*: learning_rate_scale=0.1 weight_decay=0")
    >>> group.pattern, group.learning_rate_scale, group.weight_decay, group.frozen
    ('wte/*', 0.1, 0.0, False)
    """
    pattern, _, rest = (part.strip() for part in text.partition(":"))
    words = rest.split()
    text = text[:_MAX_QUOTED]
    if not (pattern and 0 < len(words) <= len(SETTINGS)):
        raise ConfigError([
            f"got {text!r}; expected a path pattern, a colon and 1 to {len(SETTINGS)} settings; "
            "write 'wte/*: learning_rate_scale=0.1 weight_decay=0' or 'wte/*: frozen'"
        ])  # fmt: skip
    numbers: dict[str, float] = {}
    problems = []
    for word in words:
        name, has_value, value = word.partition("=")
        if name not in SETTINGS or (name == "frozen" and has_value):
            problems.append(
                f"got {word[:_MAX_QUOTED]!r} in {text!r}; expected {', '.join(SETTINGS)}"
                f"{did_you_mean(name, SETTINGS)}"
            )
        elif name in numbers:
            problems.append(f"got {name} twice in {text!r}; expected it once; keep one")
        else:
            numbers[name] = 1.0 if name == "frozen" else _number(value)
            problems += _out_of_range(text, word[:_MAX_QUOTED], name, numbers[name])
    if "frozen" in numbers and len(numbers) > 1:
        problems.append(
            f"got {text!r}; expected frozen alone, since frozen parameters have no rate and no "
            "decay; remove the other settings"
        )
    if problems:
        raise ConfigError(problems)
    return ParameterGroup(
        pattern=pattern,
        learning_rate_scale=numbers.get("learning_rate_scale", 1.0),
        weight_decay=numbers.get("weight_decay"),
        frozen="frozen" in numbers,
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _out_of_range(text: str, word: str, name: str, value: float) -> list[str]:
    if math.isfinite(value) and (value > 0 or (value == 0 and name == "weight_decay")):
        return []
    bound = "of at least 0" if name == "weight_decay" else "above 0"
    fix = "write frozen to stop training" if value == 0 else f"try {name}=0.1"
    return [f"got {word} in {text!r}; expected a finite number {bound}; {fix}"]
