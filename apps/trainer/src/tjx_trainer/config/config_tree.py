"""The configuration as values by dotted name: taken apart, and put together again.

A section may be one of several dataclasses (families of models): its value `family` says which.
"""

import re
from collections.abc import Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any, Literal, get_args, get_type_hints

from tjx_trainer.config.run_config import Config, ConfigError, check_sections


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
    """Return every value of the tree by its dotted name, in the order of the classes.

    What several families have stands there once, as the first of them has it.
    """
    found: dict[str, Leaf] = {}
    for leaf in _walk(Config, ""):
        first = found.setdefault(leaf.name, leaf)
        if leaf.name.endswith(".family") and first is not leaf:
            every = (*get_args(first.hint), *get_args(leaf.hint))
            found[leaf.name] = replace(first, hint=Literal[every])
    return found


def _walk(owner: type, prefix: str) -> Iterator[Leaf]:
    """Yield a class's own values, then those of the sections in it."""
    hints = get_type_hints(owner)
    given = [entry for entry in fields(owner) if entry.init]  # the others follow from these
    for entry in given:
        if not families(hints[entry.name]):
            default = entry.default
            if default is MISSING:
                assert entry.default_factory is not MISSING, f"{owner}.{entry.name} needs a default"
                default = entry.default_factory()
            yield Leaf(prefix + entry.name, hints[entry.name], default, owner)
    for entry in given:
        for section in families(hints[entry.name]):
            yield from _walk(section, f"{prefix}{entry.name}.")


def families(hint: Any) -> list[type]:
    """Return the dataclasses that a section may be; none for a single value."""
    kinds: tuple[Any, ...] = get_args(hint) or (hint,)
    return [kind for kind in kinds if isinstance(kind, type) and is_dataclass(kind)]


def flatten(config: Config) -> dict[str, Any]:
    """Return every value of a configuration by its dotted name.

    Values of families that the configuration's model is not of are absent.
    """
    found = dict(_values(config, ""))
    return {name: found[name] for name in leaves() if name in found}


def _values(section: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for entry in (entry for entry in fields(section) if entry.init):
        value = getattr(section, entry.name)
        if is_dataclass(value):
            yield from _values(value, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, value


def assemble(values: Mapping[str, Any]) -> Config:
    """Make a configuration from values by dotted name; the rest are defaults.

    Raises
    ------
    ConfigError
        With everything that a section refuses, and every contradiction between sections.
    """
    found = _Refusals([], set())
    sections = {}
    for name, hint in get_type_hints(Config).items():
        if not families(hint):
            sections[name] = values.get(name, leaves()[name].default)
        elif (section := _section(hint, name, values, found)) is not None:
            sections[name] = section
    problems = found.problems
    problems += [line for line in check_sections(sections) if not speaks_of(line, found.names)]
    if problems:
        raise ConfigError(problems)
    return Config(**sections)


@dataclass
class _Refusals:
    """What is wrong so far, and the dotted names of the values that are."""

    problems: list[str]
    names: set[str]


def _section(hint: Any, name: str, values: Mapping[str, Any], found: _Refusals) -> Any:
    """Make a section and those in it; what is left of it where values are refused, or None."""
    kind = _chosen(hint, name, values)
    hints = get_type_hints(kind)
    found.problems += _foreign(hint, kind, name, values)
    given: dict[str, Any] = {}
    for entry in (entry for entry in fields(kind) if entry.init):
        inner = f"{name}.{entry.name}"
        if families(hints[entry.name]):
            section = _section(hints[entry.name], inner, values, found)
            given |= {} if section is None else {entry.name: section}
        elif inner in values:
            given[entry.name] = values[inner]
    try:
        return kind(**given)
    except ValueError as error:
        lines = [f"{name}: {line}" for line in str(error).splitlines()]
    found.problems += lines
    # What is left when the refused values are taken away can still contradict others.
    bad = {f for f in given if any(speaks_of(line, {f"{name}.{f}"}) for line in lines)}
    found.names |= {f"{name}.{f}" for f in bad}
    with suppress(ValueError):
        return kind(**{f: given[f] for f in given if f not in bad})
    return None


def _chosen(hint: Any, name: str, values: Mapping[str, Any]) -> type:
    """Return the family that is asked for; the first without a word."""
    kinds = families(hint)
    family = values.get(f"{name}.family")
    return next((k for k in kinds if getattr(k, "family", None) == family), kinds[0])


def _foreign(hint: Any, kind: type, name: str, values: Mapping[str, Any]) -> list[str]:
    """Name the values that only other families have."""
    own = {leaf.name for leaf in _walk(kind, f"{name}.")}
    owners: dict[str, list[str]] = {}
    for other in families(hint):
        for leaf in _walk(other, f"{name}."):
            if leaf.name not in own:
                owners.setdefault(leaf.name, []).append(str(getattr(other, "family", "")))
    return [
        f"{given} belongs to models of the family {' or '.join(owners[given])}, and this one is of "
        f"{getattr(kind, 'family', '')}: leave it out, or give --{name}.family"
        for given in values
        if given in owners
    ]


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
