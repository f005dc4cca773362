"""The configuration as values by dotted name: taken apart, and put together again."""

import re
from collections.abc import Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, get_type_hints

from tjx_trainer.config import Config, ConfigError, contradictions


@dataclass(frozen=True)
class Leaf:
    """One value of the tree.

    Attributes
    ----------
    name : str
        Dotted name, such as ``model.n_layer``.
    hint : Any
        The type that it is annotated with.
    default : Any
        Its value where nobody gives one.
    owner : type
        The dataclass that it is a field of.
    """

    name: str
    hint: Any
    default: Any
    owner: type


@cache
def leaves() -> Mapping[str, Leaf]:
    """Return every value of the tree by its dotted name, in the order of the classes."""
    return {leaf.name: leaf for leaf in _walk(Config, "")}


def _walk(owner: type, prefix: str) -> Iterator[Leaf]:
    hints = get_type_hints(owner)
    for entry in fields(owner):
        hint = hints[entry.name]
        if is_dataclass(hint):
            assert isinstance(hint, type)
            yield from _walk(hint, f"{prefix}{entry.name}.")
        else:
            default = entry.default
            if default is MISSING:
                assert entry.default_factory is not MISSING, f"{owner}.{entry.name} needs a default"
                default = entry.default_factory()
            yield Leaf(prefix + entry.name, hint, default, owner)


def flatten(config: Config) -> dict[str, Any]:
    """Return every value of a configuration by its dotted name."""
    values = {}
    for name in leaves():
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part)
        values[name] = value
    return values


def assemble(values: Mapping[str, Any]) -> Config:
    """Make a configuration from values by dotted name; the rest are defaults.

    Raises
    ------
    ConfigError
        With everything that a section refuses, and every contradiction between sections.
    """
    problems: list[str] = []
    refused: set[str] = set()
    sections = {}
    for name, hint in get_type_hints(Config).items():
        if not is_dataclass(hint):
            sections[name] = values.get(name, leaves()[name].default)
            continue
        assert isinstance(hint, type)
        given = {f.name: values[k] for f in fields(hint) if (k := f"{name}.{f.name}") in values}
        try:
            sections[name] = hint(**given)
        except ValueError as error:
            lines = [f"{name}: {line}" for line in str(error).splitlines()]
            problems += lines
            # What is left when the refused values are taken away can still contradict others.
            bad = {f for f in given if any(speaks_of(line, {f"{name}.{f}"}) for line in lines)}
            refused |= {f"{name}.{f}" for f in bad}
            with suppress(ValueError):
                sections[name] = hint(**{f: given[f] for f in given if f not in bad})
    problems += [line for line in contradictions(sections) if not speaks_of(line, refused)]
    if problems:
        raise ConfigError(problems)
    return Config(**sections)


def speaks_of(problem: str, names: Set[str]) -> bool:
    """Tell whether a problem is about one of some dotted names.

    Examples
    --------
    >>> speaks_of("model: n_head is 5 and d_model is 64", {"model.n_head"})
    True
    """
    words = {word.rstrip(".") for word in re.findall(r"[\w.]+", problem)}
    section = problem.partition(": ")[0]
    return any(not words.isdisjoint({name, name.removeprefix(f"{section}.")}) for name in names)
