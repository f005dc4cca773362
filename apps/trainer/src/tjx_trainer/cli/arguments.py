"""Arguments of the trainer: parse flags, merge them with the preset, build the configuration."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tjx_core import ConfigError, Problem, nearest_name
from tjx_optim.optimizer_config import SETTINGS
from tjx_optim.schedule_config import SCHEDULES_BY_FIELD
from tjx_trainer.cli.values import convert, expected, union_members
from tjx_trainer.config.config_tree import Leaf, assemble, leaves, without
from tjx_trainer.config.presets import (
    DEFAULT_PRESET,
    RawValue,
    load_preset,
    preset_names,
    suggest_names,
)
from tjx_trainer.config.run_config import Config
from tjx_trainer.config.train_config import DTYPE_OF_PRECISION, ORBAX_PREFIX
from tjx_trainer.extensions import FIELDS as EXTENSION_FIELDS
from tjx_trainer.extensions import import_extensions
from tjx_trainer.scaling.dial import with_dial

COMMANDS: Mapping[str, str] = {
    "plan": "memory, time and scaling of a run, estimated without its hardware",
    "parameters": "table of parameters with their sharding over the mesh",
    "sweep": "train a grid of hyperparameters and compare the results",
    "predict": "predict the loss of a larger run from small ones, with an interval",
    "pipeline": "train a list of stages, each from the result of the one before",
}
"""Subcommands of the trainer, with a line of help each."""


def resolve(argv: Sequence[str]) -> Config:
    """Build the configuration that a command line describes.

    Raises
    ------
    ConfigError
        With all mistakes in the arguments, the preset and the values.
    """
    words = parse_args(argv)
    preset = load_preset(words.config)
    problems: list[Problem | str] = [*preset.problems, *words.problems]
    layers: list[dict[str, Any]] = []
    unread: set[str] = set()
    for layer, lost in ((preset.values, set()), (words.values, words.unread)):
        converted: dict[str, Any] = {}
        for name, given in layer.items():
            try:
                converted[name] = convert(leaves()[name], given)
            except ValueError as error:
                problems.append(str(error))
        # A value that could not be read must not be checked by its default.
        unread = (unread | layer.keys() | lost) - converted.keys()
        layers.append(converted)
    values: dict[str, Any] = {"name": preset.name}
    for each in with_dial(layers):
        values |= {**_implied(each, values), **each}
    try:
        config = assemble(values)
    except ConfigError as error:
        problems += without(error.problems, unread)
    if problems:
        raise ConfigError(problems)
    return config


def _implied(layer: Mapping[str, Any], below: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that follow from a layer's values and that it does not set itself."""
    # Another optimizer or schedule does not inherit the numbers of the preset's.
    implied = {
        name: leaves()[name].default
        for section, belongs in _DEPENDENT_FIELDS.items()
        if (chosen := layer.get(section)) is not None
        and chosen != below.get(section, leaves()[section].default)
        for name in belongs
    }
    if "train.precision" in layer:
        implied["model.dtype"] = DTYPE_OF_PRECISION[layer["train.precision"]]
        implied["model.float8"] = layer["train.precision"] == "fp8"
    weights = layer.get("train.init_from")
    if weights is not None and not weights.startswith(ORBAX_PREFIX):  # these have a tokenizer
        implied["data.tokenizer"] = weights
    if "model.vocab_size" in layer:
        implied["train.vocab_from_tokenizer"] = False
    return implied


_DEPENDENT_FIELDS: Mapping[str, tuple[str, ...]] = {
    "optimizer.name": tuple(f"optimizer.{field}" for field in SETTINGS),
    "schedule.name": tuple(f"schedule.{field}" for field in SCHEDULES_BY_FIELD),
}


# Boolean flags of the program, not of the configuration.
PROGRAM_FLAGS = ("supervise", "dry_run", "eval_only")


@dataclass
class ParsedArgs:
    """Parsed flags of a command line.

    Attributes
    ----------
    config : str
        Name or path of the preset.
    supervise : bool
        Whether to restart the trainer after a crash.
    dry_run : bool
        Whether to compile and report the run without training.
    eval_only : bool
        Whether to evaluate the initial parameters without training.
    values : dict of str to RawValue
        Values of configuration fields, by dotted name.
    problems : list of Problem or str
        Mistakes so far.
    unread : set of str
        Fields that were probably meant by mistaken flags.
    """

    config: str = DEFAULT_PRESET
    supervise: bool = False
    dry_run: bool = False
    eval_only: bool = False
    values: dict[str, RawValue] = field(default_factory=dict)
    problems: list[Problem | str] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)

    def set_program_flag(self, name: str, written: str) -> None:
        """Set one of `PROGRAM_FLAGS`."""
        leaf = Leaf(name, bool, False, ParsedArgs)
        try:
            setattr(self, name, convert(leaf, RawValue(written, f"--{name}")))
        except ValueError as error:
            self.problems.append(str(error))

    def argv(self, **values: str) -> list[str]:
        """Return the arguments of the trainer alone, with some values replaced."""
        given = {name: each.raw for name, each in self.values.items()} | values
        return [f"--config={self.config}", *(f"--{name}={raw}" for name, raw in given.items())]


def parse_args(argv: Sequence[str]) -> ParsedArgs:
    """Split a command line into flags and values: ``--a value``, ``--a=value``, bare ``--a``."""
    words = ParsedArgs(problems=list(import_extensions(_extension_values(argv))))
    seen: set[str] = set()
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not _is_flag(word):
            words.problems.append(_unexpected_word(word, is_first=len(rest) == len(argv) - 1))
            continue
        flag, has_equals, value = word.partition("=")
        name = flag.lstrip("-")
        known = word.startswith("--") and (name in ("config", *PROGRAM_FLAGS) or name in leaves())
        has_value = bool(has_equals)
        if not has_value and rest and not rest[0].startswith("--"):
            value, has_value = rest.pop(0), True
        if not known:
            near = suggest_names(name)
            words.problems.append(f"{flag}: unknown flag{_flag_hint(name)}")
            words.unread |= set(near)
        elif name in seen:
            words.problems.append(f"--{name}: given twice; keep one")
        elif name in PROGRAM_FLAGS:
            words.set_program_flag(name, value if has_value else "true")
        elif not has_value and name != "config" and bool in union_members(leaves()[name].hint):
            words.values[name] = RawValue("true", f"--{name}")
        elif not has_value or value == "":
            words.problems.append(f"--{name}: got no value; expected {_expected_for(name)}")
            words.unread.add(name)
        elif name == "config":
            words.config = value
        else:
            words.values[name] = RawValue(value, f"--{name}")
        seen.add(name)
    return words


def _extension_values(argv: Sequence[str]) -> dict[str, str]:
    """Return the values that may name extensions; their modules can add flags."""
    values = {}
    for word, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        flag, has_equals, value = word.partition("=")
        if flag.startswith("--") and flag[2:] in EXTENSION_FIELDS:
            values[flag[2:]] = value if has_equals else following
    return values


def _is_flag(word: str) -> bool:
    return len(word) > 1 and word[0] == "-" and not re.fullmatch(r"-[\d.].*|--", word)


def _unexpected_word(word: str, *, is_first: bool) -> str:
    name = word.partition("=")[0]
    command = nearest_name(word.lower(), COMMANDS)
    if is_first and command:
        return f"{word}: unknown command; did you mean {command}?"
    if word in COMMANDS:
        hint = f"commands come first, as in `trainer {word} ...`"
    elif word in preset_names():
        hint = f"did you mean --config {word}?"
    elif "=" in word and suggest_names(name):
        hint = f"did you mean --{suggest_names(name)[0]}={word.partition('=')[2]}?"
    else:
        hint = "values follow their flag, as in --train.max_steps 100"
    return f"{word}: belongs to no flag; {hint}"


def _flag_hint(name: str) -> str:
    if near := nearest_name(name, ["config", "help", *PROGRAM_FLAGS, "nanogpt"]):
        return f"; did you mean --{near}?"
    near_names = suggest_names(name)
    if near_names:
        return f"; did you mean {' or '.join(f'--{n}' for n in near_names[:4])}?"
    section = name.partition(".")[0]
    inside = [n.rpartition(".")[2] for n in leaves() if n.startswith(f"{section}.")]
    return f"; {section} has {', '.join(inside)}" if inside else "; see --help"


def _expected_for(name: str) -> str:
    if name == "config":
        return f"a preset ({', '.join(preset_names())}) or a .yaml file"
    return expected(leaves()[name], "")
