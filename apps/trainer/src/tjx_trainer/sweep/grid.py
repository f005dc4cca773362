"""The runs of a sweep: every combination of the values that are given, each checked."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_origin

from tjx_trainer.cli.command_line import parse_args, resolve, union_members
from tjx_trainer.config.config_tree import leaves
from tjx_trainer.config.run_config import Config, ConfigError

MAX_RUNS = 1000


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes
    ----------
    name : str
        Its folder's name, made of the values that are swept.
    settings : mapping of str to str
        These values as they were written, by dotted name.
    words : tuple of str
        The whole command line, without the run directory.
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
        Each value that is swept, by dotted name.
    combinations : tuple of Combination
        The runs, the last axis changing fastest.
    config : Config
        The configuration of the first.
    """

    axes: Mapping[str, tuple[str, ...]]
    combinations: tuple[SweepRun, ...]
    config: Config


def read_grid(argv: Sequence[str]) -> Grid:
    """Cut flags with several values into combinations, and check each of them.

    Numbers, choices and truth values are separated by commas; texts and lists, which may hold
    commas themselves, by semicolons. ``--config`` too takes several presets.

    Parameters
    ----------
    argv : sequence of str
        The flags of a run.

    Raises
    ------
    ConfigError
        With everything that is wrong in the words or in any combination, each once.
    """
    words = parse_args(argv)
    problems = list(words.problems)
    given = {"config": words.config, **{name: str(v.raw) for name, v in words.values.items()}}
    if "run_dir" in given:
        problems.append("--run_dir: each run of a sweep has its own; give --sweep.dir for them all")
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
    # A word that could not be read is not there to be judged beside the others.
    configs, refused = ([], []) if problems else _check(combinations)
    if problems := [*problems, *wrong, *refused]:
        raise ConfigError(problems)
    return Grid(axes, _with_own_names(combinations), configs[0])


def _axes(given: Mapping[str, str]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Return the flags that have several values, and what is wrong with them."""
    axes: dict[str, tuple[str, ...]] = {}
    problems = []
    for name, written in given.items():
        values = [value.strip() for value in written.split(separator_of(name))]
        if len(values) == 1:
            continue
        if "" in values:
            problems.append(f"--{name}: {written!r} has an empty value between two separators")
        if len(set(values)) < len(values):
            problems.append(f"--{name}: {written!r} has a value twice: keep one")
        axes[name] = tuple(dict.fromkeys(value for value in values if value))
    if not axes:
        problems.append(
            "no flag has several values, so there is nothing to compare: give one such as "
            "--optimizer.learning_rate 1e-4,3e-4,1e-3 (texts and lists are separated by ';')"
        )
    return axes, problems


def separator_of(name: str) -> str:
    """Return what stands between the values of a flag."""
    if name == "config":
        return ","
    kinds = union_members(leaves()[name].hint)
    holds_commas = str in kinds or any(get_origin(kind) is tuple for kind in kinds)
    return ";" if holds_commas and get_origin(kinds[0]) is not Literal else ","


def _combination(
    given: Mapping[str, str], settings: Mapping[str, str], more: Sequence[str]
) -> SweepRun:
    words = [f"--{name}={value}" for name, value in {**given, **settings}.items()]
    # The name of a flag alone, unless two that are swept end alike.
    last = [name.rpartition(".")[2] for name in settings]
    parts = [
        f"{own if last.count(own) == 1 else name}={value}"
        for (name, value), own in zip(settings.items(), last, strict=True)
    ]
    name = ",".join(re.sub(r"[^\w.=+-]", "-", part)[:60] for part in parts)
    return SweepRun(name, settings, (*words, *more))


def _with_own_names(combinations: Sequence[SweepRun]) -> tuple[SweepRun, ...]:
    """Make names that are the same differ, by a number: folders cannot be named by any value."""
    names = [each.name for each in combinations]
    return tuple(
        each
        if names.count(each.name) == 1
        else SweepRun(f"{each.name}-{number}", each.settings, each.words)
        for number, each in enumerate(combinations)
    )


def _check(combinations: Sequence[SweepRun]) -> tuple[list[Config], list[str]]:
    """Resolve every combination; return each problem once, and which combinations have it."""
    found: dict[str, list[SweepRun]] = {}
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
    """Return the values as numbers, or None where one is none."""
    numbers: list[Any] = []
    for value in values:
        try:
            numbers.append(float(value))
        except ValueError:
            return None
    return numbers
