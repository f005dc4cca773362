"""The command line: words become a configuration, or everything that is wrong with them is told.

Nothing here imports JAX: a mistake is answered at once.
"""

import difflib
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

from tjx_ckpt.cli.terminal import printable
from tjx_optim.schedule_config import SCHEDULES_BY_FIELD
from tjx_trainer.cli.subcommands import COMMANDS
from tjx_trainer.config.config_tree import Leaf, assemble, leaves, speaks_of
from tjx_trainer.config.presets import (
    DEFAULT_PRESET,
    RawValue,
    load_preset,
    preset_names,
    suggest_names,
)
from tjx_trainer.config.run_config import Config, ConfigError
from tjx_trainer.config.train_config import DTYPE_OF_PRECISION
from tjx_trainer.runtime.exit_codes import ExitCode


def parse(argv: Sequence[str]) -> Config:
    """Turn a command line into a configuration; leave the program if that cannot be done.

    Parameters
    ----------
    argv : sequence of str
        The words after the program's name.

    Returns
    -------
    Config
        Defaults, overridden by the preset, overridden by the flags.

    Raises
    ------
    SystemExit
        With code 2 after everything that is wrong was written to stderr; with code 0 after
        ``--help`` or ``--version``.
    """
    try:
        if {"--help", "-h"} & set(argv):
            from tjx_trainer.cli.help_page import (
                help_text,  # which reads command lines by this file
            )

            sys.stdout.write(help_text(argv))
            raise SystemExit(ExitCode.FINISHED)
        if "--version" in argv:
            from tjx_trainer.runtime.provenance import versions

            lines = [f"{name:<14} {version}" for name, version in versions().items()]
            sys.stdout.write("\n".join(lines) + "\n")
            raise SystemExit(ExitCode.FINISHED)
        return resolve(argv)
    except ConfigError as error:
        exit_with_errors(error)


def exit_with_errors(error: ConfigError) -> NoReturn:
    """Write everything that is wrong to stderr and leave with code 2."""
    sys.stderr.write(format_errors(error))
    raise SystemExit(ExitCode.USER_ERROR)


def format_errors(error: ConfigError) -> str:
    """Write everything that is wrong, a line each."""
    count = len(error.problems)
    lines = [f"{count} mistake{'s' if count > 1 else ''}, so nothing was started:"]
    for problem in error.problems:
        first, *rest = problem.splitlines()
        lines += [f"  * {first}", *(f"    {line}" for line in rest)]
    return printable("\n".join([*lines, "`--help` lists every flag and preset."]) + "\n")


def resolve(argv: Sequence[str]) -> Config:
    """Turn a command line into a configuration.

    Raises
    ------
    ConfigError
        With everything that is wrong in the words, the preset and the values.
    """
    words = parse_args(argv)
    preset = load_preset(words.config)
    problems = [*preset.problems, *words.problems]
    values: dict[str, Any] = {"name": preset.name}
    unread: set[str] = set()
    for layer, lost in ((preset.values, set()), (words.values, words.unread)):
        converted: dict[str, Any] = {}
        for name, given in layer.items():
            try:
                converted[name] = convert(leaves()[name], given)
            except ValueError as error:
                problems.append(str(error))
        unread = (unread | layer.keys() | lost) - converted.keys()
        values |= {**_implied(converted, values), **converted}
    try:
        config = assemble(values)
    except ConfigError as error:
        problems += [line for line in error.problems if not speaks_of(line, unread)]
    if problems:
        raise ConfigError(problems)
    return config


def _implied(layer: Mapping[str, Any], below: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a layer's values imply where the layer does not say it."""
    # The numbers of a preset's optimizer and schedule are not those of another one.
    implied = {
        name: leaves()[name].default
        for section, belongs in _BELONGS_TO.items()
        if (chosen := layer.get(section)) is not None
        and chosen != below.get(section, leaves()[section].default)
        for name in belongs
    }
    if "train.precision" in layer:
        implied["model.dtype"] = DTYPE_OF_PRECISION[layer["train.precision"]]
        implied["model.float8"] = layer["train.precision"] == "fp8"
    if layer.get("train.init_from") is not None:  # weights belong to the ids of one tokenizer
        implied["data.tokenizer"] = layer["train.init_from"]
    if "model.vocab_size" in layer:
        implied["train.vocab_from_tokenizer"] = False
    return implied


_BELONGS_TO: Mapping[str, tuple[str, ...]] = {
    "optimizer.name": tuple(
        f"optimizer.{field}"
        for field in ("weight_decay", "b1", "b2", "eps", "momentum", "nesterov")
    ),
    "schedule.name": tuple(f"schedule.{field}" for field in SCHEDULES_BY_FIELD),
}


# Flags of the program itself, true or false.
PROGRAM_FLAGS = ("supervise", "dry_run", "eval_only")


@dataclass
class ParsedArgs:
    """A command line, cut into flags and their values.

    Attributes
    ----------
    config : str
        The preset's name or path.
    supervise : bool
        Whether the trainer is to be started again after a crash.
    dry_run : bool
        Whether the run is only to be prepared, compiled and told.
    eval_only : bool
        Whether the parameters that a run begins with are only to be evaluated.
    values : dict of str to Given
        The flags' values, by dotted name.
    problems : list of str
        Everything wrong so far.
    unread : set of str
        Names that were probably meant but could not be read.
    """

    config: str = DEFAULT_PRESET
    supervise: bool = False
    dry_run: bool = False
    eval_only: bool = False
    values: dict[str, RawValue] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)

    def set_program_flag(self, name: str, written: str) -> None:
        """Take what was given to one of `SWITCHES`."""
        leaf = Leaf(name, bool, False, ParsedArgs)
        try:
            setattr(self, name, convert(leaf, RawValue(written, f"--{name}")))
        except ValueError as error:
            self.problems.append(str(error))

    def argv(self, **values: str) -> list[str]:
        """Return the words anew for the trainer alone, some values being others."""
        given = {name: each.raw for name, each in self.values.items()} | values
        return [f"--config={self.config}", *(f"--{name}={raw}" for name, raw in given.items())]


def parse_args(argv: Sequence[str]) -> ParsedArgs:
    """Cut a command line into flags and values: ``--a value``, ``--a=value``, bare ``--a``."""
    words = ParsedArgs()
    seen: set[str] = set()
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not _is_flag(word):
            words.problems.append(_stray(word, is_first=len(rest) == len(argv) - 1))
            continue
        flag, has_equals, value = word.partition("=")
        name = flag.lstrip("-")
        known = word.startswith("--") and (name in ("config", *PROGRAM_FLAGS) or name in leaves())
        has_value = bool(has_equals)
        if not has_value and rest and not rest[0].startswith("--"):
            value, has_value = rest.pop(0), True
        if not known:
            near = suggest_names(name)
            words.problems.append(f"{flag}: there is no such flag{_flag_hint(name)}")
            words.unread |= set(near)
        elif name in seen:
            words.problems.append(f"--{name} is given twice: keep one")
        elif name in PROGRAM_FLAGS:
            words.set_program_flag(name, value if has_value else "true")
        elif not has_value and name != "config" and bool in union_members(leaves()[name].hint):
            words.values[name] = RawValue("true", f"--{name}")
        elif not has_value or value == "":
            words.problems.append(f"--{name}: its value is missing, expected {_expected_for(name)}")
            words.unread.add(name)
        elif name == "config":
            words.config = value
        else:
            words.values[name] = RawValue(value, f"--{name}")
        seen.add(name)
    return words


def _is_flag(word: str) -> bool:
    return len(word) > 1 and word[0] == "-" and not re.fullmatch(r"-[\d.].*|--", word)


def _stray(word: str, *, is_first: bool) -> str:
    name = word.partition("=")[0]
    commands = difflib.get_close_matches(word.lower(), COMMANDS, n=1)
    if is_first and commands:
        return f"{word}: there is no such command; did you mean {commands[0]}?"
    if word in COMMANDS:
        hint = f"a command comes first, as in `trainer {word} ...`"
    elif word in preset_names():
        hint = f"did you mean --config {word}?"
    elif "=" in word and suggest_names(name):
        hint = f"did you mean --{suggest_names(name)[0]}={word.partition('=')[2]}?"
    else:
        hint = "every value follows its flag, as in --train.max_steps 100"
    return f"{word}: this belongs to no flag; {hint}"


def _flag_hint(name: str) -> str:
    if near := difflib.get_close_matches(name, ["config", "help", *PROGRAM_FLAGS, "nanogpt"], n=1):
        return f"; did you mean --{near[0]}?"
    near_names = suggest_names(name)
    if near_names:
        return f"; did you mean {' or '.join(f'--{n}' for n in near_names[:4])}?"
    section = name.partition(".")[0]
    inside = [n.rpartition(".")[2] for n in leaves() if n.startswith(f"{section}.")]
    return f"; {section} has {', '.join(inside)}" if inside else "; see --help"


def _expected_for(name: str) -> str:
    if name == "config":
        return f"a preset ({', '.join(preset_names())}) or a .yaml file"
    return _expected(leaves()[name], "")


def convert(leaf: Leaf, given: RawValue) -> Any:
    """Turn what was written into a value of the leaf's type.

    Raises
    ------
    ValueError
        Naming where it was written, what is allowed, and an example or the nearest choice.

    Examples
    --------
    >>> convert(leaves()["optimizer.learning_rate"], Given("6e-4", "--optimizer.learning_rate"))
    0.0006
    """
    choices = union_members(leaf.hint)
    core = choices[0]
    raw: Any = given.raw
    is_word_none = isinstance(raw, str) and raw.lower() in {"none", "null"}
    if type(None) in choices and (raw is None or is_word_none):
        return None
    if get_origin(core) is Literal:
        raw = {format_value(option): option for option in get_args(core)}.get(
            format_value(raw), raw
        )
    is_list = get_origin(core) is tuple and isinstance(raw, str)
    if is_list and ("," in raw or not {int, float, str} & set(choices)):
        raw = [] if is_word_none else [part.strip() for part in raw.split(",")]
    try:
        if raw is None or raw == "" != leaf.default:
            raise ValueError
        return _reader(leaf.hint)(raw)
    except (ValidationError, ValueError):
        written = format_value(given.raw)
        shown = f"{written[:60]!r}" if written else "an empty value"
        raise ValueError(
            f"{given.where}: {shown} was given, expected {_expected(leaf, written)}"
        ) from None


@cache
def _reader(hint: Any) -> Callable[[Any], Any]:
    return TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False)).validate_python


def union_members(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, None last; of anything else, itself."""
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(sorted(get_args(hint), key=lambda member: member is type(None)))
    return (hint,)


def _expected(leaf: Leaf, written: str) -> str:
    """Say what a leaf takes, with an example or the choice nearest to what was written."""
    choices = union_members(leaf.hint)
    core = choices[0]
    example = leaf.default
    if get_origin(core) is Literal:
        options = [format_value(option) for option in get_args(core)]
        near = difflib.get_close_matches(written.lower(), options, n=1, cutoff=0.4)
        text = f"one of {', '.join(options)}" + (f"; did you mean {near[0]}?" if near else "")
        return text + (" (none is allowed too)" if type(None) in choices else "")
    if core is bool:
        text = "true or false"
    elif core is int:
        text = f"a whole number, such as {_whole(written) or example or 1}"
    elif core is float:
        text = f"a number, such as {example or 0.1}"
    elif get_origin(core) is tuple:
        some = "one,two" if str in get_args(core) else "1,2"
        text = f"a comma list, such as {format_value(example) if example else some}"
    else:
        text = f"a text{f', such as {example}' if example else ''}"
    return text + (", or none" if type(None) in choices else "")


def _whole(written: str) -> int | None:
    """Return the whole number that was meant by text such as 1e3."""
    try:
        number = float(written)
        return int(number) if number.is_integer() and abs(number) < 1e15 else None
    except ValueError:
        return None


def format_value(value: Any) -> str:
    """Write a value as it is given on the command line.

    Examples
    --------
    >>> text_of(None), text_of(True), text_of((1, 2)), text_of(6e-4)
    ('none', 'true', '1,2', '0.0006')
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ",".join(format_value(item) for item in value) or "none"
    return str(value)
