"""Grid of a sweep: all combinations of the given values, each validated."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_origin

from tjx_core import ConfigError, Problem
from tjx_trainer.cli.arguments import parse_args, resolve
from tjx_trainer.cli.values import union_members
from tjx_trainer.config.config_tree import leaves
from tjx_trainer.config.run_config import Config

MAX_RUNS = 1000


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes
    ----------
    name : str
        Name of its folder, from the swept values.
    settings : mapping of str to str
        The swept values as given, by dotted name.
    words : tuple of str
        Its command line, without the run directory.
    """

    name: str
    settings: Mapping[str, str]
    words: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """A sweep.

    Attributes
    ----------
    axes : mapping of str to tuple of str
        The swept values by dotted name.
    combinations : tuple of SweepRun
        The runs; the last axis varies fastest.
    config : Config
        The configuration of the first run.
    """

    axes: Mapping[str, tuple[str, ...]]
    combinations: tuple[SweepRun, ...]
    config: Config


def read_grid(argv: Sequence[str]) -> Grid:
    """Expand flags with several values into runs, and validate each of them.

    Numbers, choices and booleans are separated by commas; text and lists, which may contain commas,
    by semicolons. ``--config`` accepts several presets.

    Parameters
    ----------
    argv : sequence of str
        The flags of the runs.

    Raises
    ------
    ConfigError
        With all mistakes in the command line and in any run, each once.
    """
    words = parse_args(argv)
    problems = list(words.problems)
    given = {"config": words.config, **{name: str(v.raw) for name, v in words.values.items()}}
    if "run_dir" in given:
        problems.append("--run_dir: every run of a sweep has its own; give --sweep.dir instead")
    axes, wrong = _axes(given)
    combinations: list[SweepRun] = []
    if math.prod(map(len, axes.values())) > MAX_RUNS:
        wrong.append(f"more than {MAX_RUNS} combinations: give fewer values")
    else:
        supervise = ["--supervise"] if words.supervise else []
        combinations = [
            _combination(given, dict(zip(axes, values, strict=True)), supervise)
            for values in itertools.product(*axes.values())
        ]
    # Do not validate runs whose flags could not be parsed.
    configs, refused = ([], []) if problems else _check(combinations)
    if problems := [*problems, *wrong, *refused]:
        raise ConfigError(problems)
    return Grid(axes, _with_own_names(combinations), configs[0])


def _axes(
    given: Mapping[str, str],
) -> tuple[dict[str, tuple[str, ...]], list[Problem | str]]:
    """Return the flags with several values, and the mistakes in them."""
    axes: dict[str, tuple[str, ...]] = {}
    problems: list[Problem | str] = []
    for name, written in given.items():
        values = [value.strip() for value in written.split(separator_of(name))]
        if len(values) == 1:
            continue
        if "" in values:
            problems.append(f"--{name}: got {written!r} with an empty value; remove a separator")
        if len(set(values)) < len(values):
            problems.append(f"--{name}: got {written!r} with a repeated value; keep one")
        axes[name] = tuple(dict.fromkeys(value for value in values if value))
    if not axes:
        problems.append(
            "no flag has several values; give one such as --optimizer.learning_rate "
            "1e-4,3e-4,1e-3 (separate text and lists by ';')"
        )
    return axes, problems


def separator_of(name: str) -> str:
    """Return the separator between the values of a flag."""
    if name == "config":
        return ","
    kinds = union_members(leaves()[name].hint)
    holds_commas = str in kinds or any(get_origin(kind) is tuple for kind in kinds)
    return ";" if holds_commas and get_origin(kinds[0]) is not Literal else ","


def _combination(
    given: Mapping[str, str], settings: Mapping[str, str], more: Sequence[str]
) -> SweepRun:
    words = [f"--{name}={value}" for name, value in {**given, **settings}.items()]
    # The last part of a flag's name, unless two swept flags share it.
    last = [name.rpartition(".")[2] for name in settings]
    parts = [
        f"{own if last.count(own) == 1 else name}={value}"
        for (name, value), own in zip(settings.items(), last, strict=True)
    ]
    name = ",".join(re.sub(r"[^\w.=+-]", "-", part)[:60] for part in parts)
    return SweepRun(name, settings, (*words, *more))


def _with_own_names(combinations: Sequence[SweepRun]) -> tuple[SweepRun, ...]:
    """Make equal folder names unique by appending a number."""
    names = [each.name for each in combinations]
    return tuple(
        each
        if names.count(each.name) == 1
        else SweepRun(f"{each.name}-{number}", each.settings, each.words)
        for number, each in enumerate(combinations)
    )


def _check(combinations: Sequence[SweepRun]) -> tuple[list[Config], list[Problem | str]]:
    """Validate every run; return each problem once, with the runs that have it."""
    found: dict[Problem, list[SweepRun]] = {}
    configs = []
    for each in combinations:
        try:
            configs.append(resolve(each.words))
        except ConfigError as error:
            for problem in error.problems:
                found.setdefault(problem, []).append(each)
    every = len(combinations)
    return configs, [
        problem if len(those) == every else f"{problem} (with {_shown(those)})"
        for problem, those in found.items()
    ]


def _shown(combinations: Sequence[SweepRun]) -> str:
    first = combinations[0].name
    more = len(combinations) - 1
    return first if not more else f"{first} and {more} more"


def as_numbers(values: Sequence[str]) -> list[float] | None:
    """Return the values as numbers; None if one is not a number."""
    numbers: list[Any] = []
    for value in values:
        try:
            numbers.append(float(value))
        except ValueError:
            return None
    return numbers
