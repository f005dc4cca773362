"""`trainer plan`: what a run needs, what it costs and how it scales, before there is a machine.

Nothing here imports JAX before the command line is read: a mistake is answered at once.
"""

import difflib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_type_hints

from tjx_parallel.config import AXES
from tjx_parallel.planning.chips import CHIPS, Chip, find_chip
from tjx_trainer.cli.command_line import convert, exit_with_errors, format_value, resolve
from tjx_trainer.config.config_tree import Leaf, leaves
from tjx_trainer.config.presets import RawValue
from tjx_trainer.config.run_config import Config, ConfigError
from tjx_trainer.runtime.exit_codes import ExitCode
from tjx_trainer.runtime.xla_flags import request_determinism, set_flags

_HELP = """\
usage: trainer plan --chip NAME [--chips N] [--compute_efficiency X] [--out DIR]
                    [--config NAME_OR_PATH] [--section.name VALUE] ...

Tells what a run needs on each device, how long a step takes, and how it scales from 1 to 1024
devices: the step is compiled for devices that need not be there, and no data are read. Where the
compiler of the chip is installed, the time is estimated kernel by kernel from its program.

"""


@dataclass(frozen=True, kw_only=True)
class PlanFlags:
    """What is told beside the run's own flags.

    Attributes
    ----------
    chip
        The accelerator.
    chips
        Devices; none: the product of the mesh's sizes, where -1 counts as 1.
    compute_efficiency
        Share of the peak that computing is assumed to reach; none: estimated from the compiled
        program, or by formula with the share of a public measurement where the compiler of the
        chip is not installed.
    out
        Folder for plan.json, step.hlo.txt, memory.png and scaling.png; none: nothing is written.
    """

    chip: str = "h100"
    chips: int | None = None
    compute_efficiency: float | None = None
    out: str | None = None


@dataclass(frozen=True, kw_only=True)
class ParameterFlags:
    """What is told beside the run's own flags.

    Attributes
    ----------
    chips
        Devices; none: the product of the mesh's sizes, where -1 counts as 1.
    """

    chips: int | None = None


def run(argv: Sequence[str]) -> int:
    """Print the plan of a run, and write it where that was asked for.

    Parameters
    ----------
    argv : sequence of str
        The words after ``plan``.

    Returns
    -------
    int
        0, whether the run fits or not.

    Raises
    ------
    SystemExit
        With code 2 after everything that is wrong was written to stderr.
    """
    if {"--help", "-h"} & set(argv):
        sys.stdout.write(_HELP + command_help(PlanFlags))
        return ExitCode.FINISHED
    try:
        flags, config = read_flags(argv, PlanFlags)
        chip, count = _chip(flags), device_count(flags.chips, config)
        if chip.platform == "cuda":
            set_flags("gpu")  # as a run on it would have them
            if config.train.deterministic:
                request_determinism()
        # They bring JAX, which takes seconds to import.
        from tjx_parallel.planning.step_time import plan
        from tjx_trainer.planning.compiled_step import plan_step
        from tjx_trainer.planning.report import page

        try:
            planned = plan_step(config, chip, count)
        except ValueError as error:
            raise ConfigError(str(error).splitlines()) from error
    except ConfigError as error:
        exit_with_errors(error)
    found = plan(planned.step, chip, compute_efficiency=flags.compute_efficiency)
    sys.stdout.write(page(config, found, planned))
    if flags.out is not None:
        _, rest, _ = split_command_flags(argv, ["out"])  # a result names no folder of this machine
        for file in write(Path(flags.out), config, found, planned, rest):
            sys.stdout.write(f"{file}\n")
    return ExitCode.FINISHED


def write(
    folder: Path, config: Config, found: Any, planned: Any, flags: Sequence[str]
) -> list[Path]:
    """Write a plan as numbers and as two pictures, and the program; return the files."""
    from tjx_trainer.planning.plots import draw_memory, draw_scaling
    from tjx_trainer.planning.report import summary

    folder.mkdir(parents=True, exist_ok=True)
    names = ("plan.json", "step.hlo.txt", "memory.png", "scaling.png")
    files = [folder / name for name in names]
    origin = {
        "date": date.today().isoformat(),
        "flags": list(flags),
        "versions": _versions(),
    }
    files[0].write_text(json.dumps({**origin, **summary(found, planned)}, indent=2) + "\n")
    files[1].write_text(planned.hlo)
    draw_memory(found, files[2], title=config.name)
    draw_scaling(found, files[3], title=config.name)
    return files


def _versions() -> dict[str, str]:
    """Return the versions of JAX and of the compilers that are installed."""
    found = {}
    for name in ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def read_flags[Flags: (PlanFlags, ParameterFlags)](
    argv: Sequence[str], kind: type[Flags]
) -> tuple[Flags, Config]:
    """Read a command's own flags, and the run's.

    Raises
    ------
    ConfigError
        With everything that is wrong in either.
    """
    own, rest, problems = split_command_flags(argv, [field.name for field in fields(kind)])
    values = read_command_flags(own, kind, problems)
    try:
        config = resolve(rest)
    except ConfigError as error:
        problems += error.problems
    if isinstance(chip := values.get("chip"), str):
        try:
            find_chip(chip)
        except ValueError as error:
            problems.append(f"--chip: {error}")
    efficiency = values.get("compute_efficiency")
    if efficiency is not None and not 0 < efficiency <= 1:
        problems.append(f"--compute_efficiency: {efficiency:g} was given, expected a share, as 0.5")
    if problems:
        raise ConfigError(problems)
    return kind(**values), config


def read_command_flags(
    own: Mapping[str, str], kind: type, problems: list[str], *, prefix: str = ""
) -> dict[str, Any]:
    """Turn what was given to a command's own flags into values, by the names of its fields.

    Parameters
    ----------
    own : mapping of str to str
        By the flags' names.
    kind : type
        The dataclass.
    problems : list of str
        What cannot be read is added to it.
    prefix : str
        What stands before the fields' names in those of the flags.
    """
    values = {}
    for name, written in own.items():
        field = name.removeprefix(prefix)
        leaf = Leaf(field, get_type_hints(kind)[field], getattr(kind, field), kind)
        try:
            values[field] = convert(leaf, RawValue(written, f"--{name}"))
        except ValueError as error:
            problems.append(str(error))
    return values


def split_command_flags(
    argv: Sequence[str], own: Sequence[str]
) -> tuple[dict[str, str], list[str], list[str]]:
    """Divide a command line into a command's own flags with their values, the rest, and mistakes.

    Examples
    --------
    >>> split_words(["--chip", "h100", "--model.n_layer=2"], ["chip"])
    ({'chip': 'h100'}, ['--model.n_layer=2'], [])
    """
    found: dict[str, str] = {}
    others: list[str] = []
    problems: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        name, has_value, value = word.removeprefix("--").partition("=")
        near = difflib.get_close_matches(name, own, n=1, cutoff=0.75)
        is_flag = word.startswith("--") and name not in leaves() and name != "config"
        if not is_flag or not near:
            others.append(word)
            continue
        if not has_value:
            value = words.pop(0) if words and not words[0].startswith("--") else ""
        if name not in own:
            problems.append(f"--{name}: there is no such flag; did you mean --{near[0]}?")
        elif name in found:
            problems.append(f"--{name} is given twice: keep one")
        elif not value:
            problems.append(f"--{name}: its value is missing")
        else:
            found[name] = value
    return found, others, problems


def command_help(kind: type, *, prefix: str = "") -> str:
    """Describe a command's own flags, whose names begin with `prefix`."""
    import docstring_parser

    lines = [
        f"  --{prefix + each.arg_name:<22}{' '.join((each.description or '').split())} "
        f"[{format_value(getattr(kind, each.arg_name))}]"
        for each in docstring_parser.parse_from_object(kind).params
    ]
    if kind is PlanFlags:
        lines += [f"  chips: {', '.join(CHIPS)}"]
    lines += ["", "All flags and presets of a run: `--help` without a command."]
    return "\n".join(lines) + "\n"


def device_count(chips: int | None, config: Config) -> int:
    """Return on how many devices a run is planned.

    Raises
    ------
    ConfigError
        If the mesh is not of so many.
    """
    sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
    count = chips or math.prod(size for size in sizes.values() if size > 0)
    try:
        config.mesh.axis_sizes(count)
    except ValueError as error:
        raise ConfigError([f"--chips {count}: {error}"]) from error
    return count


def _chip(flags: PlanFlags) -> Chip:
    """Return the chip, with the share of its memory that JAX is told to take."""
    chip = find_chip(flags.chip)
    share = os.environ.get("XLA_CLIENT_MEM_FRACTION")
    if share is None or chip.platform != "cuda":
        return chip
    try:
        return chip._replace(usable=float(share))
    except ValueError:
        raise ConfigError([f"XLA_CLIENT_MEM_FRACTION {share!r}: must be a share, as .92"]) from None
