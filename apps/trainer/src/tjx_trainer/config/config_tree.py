"""Configuration as a flat mapping of dotted names: flatten and assemble.

A section can be one of several dataclasses (model families), selected by its field ``family``.
"""

from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any, Literal, get_args, get_type_hints

from tjx_core import ConfigError, Problem, problems_of
from tjx_nn.config import TransformerConfig
from tjx_nn.registry import registered_families
from tjx_trainer.config.phases import parse_phases
from tjx_trainer.config.run_config import Config, ModelConfig, check_sections


@dataclass(frozen=True)
class Leaf:
    """One value of the configuration tree.

    Attributes
    ----------
    name : str
        Dotted name, such as ``model.n_layer``.
    hint : Any
        Type annotation.
    default : Any
        Default value.
    owner : type
        The dataclass that has the field.
    """

    name: str
    hint: Any
    default: Any
    owner: type


def leaves() -> Mapping[str, Leaf]:
    """Return every value of the tree by dotted name, in definition order.

    A name that several families share appears once, with the type of the first family.
    """
    return _leaves(_added_families())


@cache
def _leaves(added: tuple[type, ...]) -> Mapping[str, Leaf]:  # noqa: ARG001  read by `families`
    found: dict[str, Leaf] = {}
    for leaf in _walk(Config, ""):
        first = found.setdefault(leaf.name, leaf)
        if leaf.name.endswith(".family") and first is not leaf:
            every = (*get_args(first.hint), leaf.default)
            found[leaf.name] = first = replace(first, hint=Literal[every])
    return found


def _walk(owner: type, prefix: str) -> Iterator[Leaf]:
    """Yield the values of a class, then those of its sections."""
    hints = get_type_hints(owner)
    given = [entry for entry in fields(owner) if entry.init]  # other fields are derived
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
    """Return the dataclasses that a section can be; empty for a single value."""
    kinds: tuple[Any, ...] = get_args(hint) or (hint,)
    if hint == ModelConfig:
        kinds += _added_families()
    return [kind for kind in kinds if isinstance(kind, type) and is_dataclass(kind)]


def _added_families() -> tuple[type, ...]:
    """Return the model configurations of other packages that a run can select."""
    built_in = {kind.family for kind in get_args(ModelConfig)}
    return tuple(
        kind
        for family, kind in registered_families().items()
        if family not in built_in and issubclass(kind, TransformerConfig)
    )


def flatten(config: Config) -> dict[str, Any]:
    """Return every value of a configuration by dotted name, without fields of other families."""
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
    """Build a configuration from values by dotted name; missing values are defaults.

    Raises
    ------
    ConfigError
        With the problems of every section, every contradiction between sections, and those of the
        phases.
    """
    rejected = _Rejected([], set())
    sections = {}
    for name, hint in get_type_hints(Config).items():
        if not families(hint):
            sections[name] = values.get(name, leaves()[name].default)
        elif (section := _build_section(hint, name, values, rejected)) is not None:
            sections[name] = section
    problems = rejected.problems + without(check_sections(sections), rejected.names)
    if problems:
        raise ConfigError(problems)
    config = Config(**sections)
    phase_configs(config)  # for its checks
    return config


def phase_configs(config: Config) -> dict[int, Config]:
    """Return the configuration of each phase of a run by its first step.

    Parameters
    ----------
    config : Config
        The configuration of the run, which holds before the first phase. Values that a phase does
        not name are those of the run, not of the phase before.

    Raises
    ------
    ConfigError
        With all problems of all phases.
    """
    if config.train.phases is None:
        return {}
    base = {**flatten(config), "train.phases": None}
    configs, problems = {}, []
    for step, values in parse_phases(config.train.phases)[0].items():
        try:
            configs[step] = assemble(base | values)
        except ConfigError as error:
            problems += [
                Problem("train.phases", f"from step {step}: {each}", each.paths)
                for each in error.problems
            ]
    if problems:
        raise ConfigError(problems)
    return configs


def without(problems: Iterable[Problem], names: Set[str]) -> list[Problem]:
    """Return the problems that concern none of the given dotted names."""
    return [problem for problem in problems if names.isdisjoint(problem.paths)]


@dataclass
class _Rejected:
    """Problems so far, and the dotted names of the rejected values."""

    problems: list[Problem]
    names: set[str]


def _build_section(hint: Any, name: str, values: Mapping[str, Any], rejected: _Rejected) -> Any:
    """Build a section with its subsections; without its rejected values, or None."""
    kind = _chosen(hint, name, values)
    hints = get_type_hints(kind)
    rejected.problems += _foreign(hint, kind, name, values)
    given: dict[str, Any] = {}
    for entry in (entry for entry in fields(kind) if entry.init):
        inner = f"{name}.{entry.name}"
        if families(hints[entry.name]):
            section = _build_section(hints[entry.name], inner, values, rejected)
            given |= {} if section is None else {entry.name: section}
        elif inner in values:
            given[entry.name] = values[inner]
    try:
        return kind(**given)
    except ValueError as error:
        problems = [problem.within(name) for problem in problems_of(error)]
    rejected.problems += problems
    # The remaining values can still contradict other sections.
    paths = {path for problem in problems for path in problem.paths}
    bad = {field for field in given if f"{name}.{field}" in paths}
    rejected.names |= {f"{name}.{field}" for field in bad}
    with suppress(ValueError):
        return kind(**{field: given[field] for field in given if field not in bad})
    return None


def _chosen(hint: Any, name: str, values: Mapping[str, Any]) -> type:
    """Return the dataclass of the selected family; by default the first."""
    kinds = families(hint)
    family = values.get(f"{name}.family")
    return next((k for k in kinds if getattr(k, "family", None) == family), kinds[0])


def _foreign(hint: Any, kind: type, name: str, values: Mapping[str, Any]) -> list[Problem]:
    """Return a problem for each value that only other families have."""
    own = {leaf.name for leaf in _walk(kind, f"{name}.")}
    owners: dict[str, list[str]] = {}
    for other in families(hint):
        for leaf in _walk(other, f"{name}."):
            if leaf.name not in own:
                owners.setdefault(leaf.name, []).append(str(getattr(other, "family", "")))
    return [
        Problem(
            given,
            f"got a value with {name}.family {getattr(kind, 'family', '')}; expected "
            f"{' or '.join(owners[given])}; leave it out, or give --{name}.family",
            (f"{name}.family",),
        )
        for given in values
        if given in owners
    ]
