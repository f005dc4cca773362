"""Conversion between text and configuration values."""

import types
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

from tjx_core import did_you_mean
from tjx_trainer.config.config_tree import Leaf
from tjx_trainer.config.presets import RawValue


def convert(leaf: Leaf, given: RawValue) -> Any:
    """Convert text from a flag or preset to a value of the leaf's type.

    Parameters
    ----------
    leaf : Leaf
        The field, with its type.
    given : RawValue
        The text and its origin.

    Raises
    ------
    ValueError
        Naming the origin, the expected type, and an example or the nearest choice.

    Examples
    --------
    >>> from tjx_trainer.config.config_tree import leaves
    >>> convert(leaves()["optimizer.learning_rate"], RawValue("6e-4", "--optimizer.learning_rate"))
    0.0006
    """
    choices = union_members(leaf.hint)
    core = choices[0]
    raw: Any = given.raw
    is_word_none = isinstance(raw, str) and raw.lower() in {"none", "null"}
    if type(None) in choices and (raw is None or is_word_none):
        return None
    if get_origin(core) is Literal:
        options = {format_value(option): option for option in get_args(core)}
        raw = options.get(format_value(raw), raw)
    is_list = get_origin(core) is tuple and isinstance(raw, str)
    if is_list and ("," in raw or not {int, float, str} & set(choices)):
        raw = [] if is_word_none else [part.strip() for part in raw.split(",")]
    try:
        if raw is None or raw == "" != leaf.default:
            raise ValueError
        return _validator(leaf.hint)(raw)
    except (ValidationError, ValueError):
        written = format_value(given.raw)
        shown = f"{written[:60]!r}" if written else "an empty value"
        raise ValueError(
            f"{given.where}: got {shown}; expected {expected(leaf, written)}"
        ) from None


@cache
def _validator(hint: Any) -> Callable[[Any], Any]:
    return TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False)).validate_python


def union_members(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union type, None last; a tuple of itself for other types."""
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(sorted(get_args(hint), key=lambda member: member is type(None)))
    return (hint,)


def expected(leaf: Leaf, written: str) -> str:
    """Describe the values of a leaf, with an example or the choice nearest to `written`."""
    choices = union_members(leaf.hint)
    core = choices[0]
    example = leaf.default
    if get_origin(core) is Literal:
        options = [format_value(option) for option in get_args(core)]
        hint = did_you_mean(written.lower(), options, cutoff=0.4)
        if leaf.name == "model.family" and not hint:
            hint = "; add it with tjx_nn.register and a subclass of TransformerConfig"
        none = " (none is allowed too)" if type(None) in choices else ""
        return f"one of {', '.join(options)}{hint}{none}"
    if core is bool:
        text = "true or false"
    elif core is int:
        text = f"a whole number, such as {_whole(written) or example or 1}"
    elif core is float:
        text = f"a number, such as {example or 0.1}"
    elif get_origin(core) is tuple:
        some = "one,two" if str in get_args(core) else "1,2"
        text = f"a comma-separated list, such as {format_value(example) if example else some}"
    else:
        text = f"text{f', such as {example}' if example else ''}"
    return text + (", or none" if type(None) in choices else "")


def _whole(written: str) -> int | None:
    """Return the whole number that text such as 1e3 stands for."""
    try:
        number = float(written)
        return int(number) if number.is_integer() and abs(number) < 1e15 else None
    except ValueError:
        return None


def format_value(value: Any) -> str:
    """Format a value as it is written on the command line.

    Examples
    --------
    >>> format_value(None), format_value(True), format_value((1, 2)), format_value(6e-4)
    ('none', 'true', '1,2', '0.0006')
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ",".join(format_value(item) for item in value) or "none"
    return str(value)
