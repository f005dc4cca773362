"""``trainer plan``: memory, time and scaling of a run, estimated without its hardware.

JAX is imported after the command line is parsed, so mistakes are reported at once.
"""

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

from tjx_core import ConfigError, Problem, nearest_name, problems_of
from tjx_parallel.config import AXES
from tjx_parallel.planning.chips import CHIPS, Chip, find_chip
from tjx_trainer.cli.arguments import resolve
from tjx_trainer.cli.command_line import exit_with_errors
from tjx_trainer.cli.values import convert, format_value
from tjx_trainer.config.config_tree import Leaf, leaves
from tjx_trainer.config.presets import RawValue
from tjx_trainer.config.run_config import Config
from tjx_trainer.runtime.exit_codes import ExitCode
from tjx_trainer.runtime.xla_flags import request_determinism, request_reproducibility, set_flags

_HELP = """\
usage: trainer plan --chip NAME [--chips N] [--compute_efficiency X] [--out DIR]
                    [--config NAME_OR_PATH] [--section.name VALUE] ...

Prints the memory per device, the time of a step, and the scaling from 1 to 1024 devices. The step
is compiled ahead of time for devices that need not exist, and no data are read. If the compiler of
the chip is installed, the time is estimated kernel by kernel from the compiled program.

"""


@dataclass(frozen=True, kw_only=True)
class PlanFlags:
    """Flags of `trainer plan` besides those of the run.

    Attributes
    ----------
    chip
        The accelerator.
    chips
        Number of devices; none: the product of the mesh sizes, -1 counting as 1.
    compute_efficiency
        Fraction of peak FLOP/s that computation reaches; none: estimated from the compiled program,
        or a published measurement if the compiler of the chip is not installed.
    out
        Folder for plan.json, step.hlo.txt, memory.png and scaling.png; none: nothing is written.
    """

    chip: str = "h100"
    chips: int | None = None
    compute_efficiency: float | None = None
    out: str | None = None


@dataclass(frozen=True, kw_only=True)
class ParameterFlags:
    """Flags of `trainer parameters` besides those of the run.

    Attributes
    ----------
    chips
        Number of devices; none: the product of the mesh sizes, -1 counting as 1.
    """

    chips: int | None = None


def run(argv: Sequence[str]) -> int:
    """Print the plan of a run, and write it with ``--out``.

    Parameters
    ----------
    argv : sequence of str
        The arguments after ``plan``.

    Returns
    -------
    int
        0, whether the run fits into memory or not.

    Raises
    ------
    SystemExit
        With code 2 after printing all mistakes.
    """
    if {"--help", "-h"} & set(argv):
        sys.stdout.write(_HELP + command_help(PlanFlags))
        return ExitCode.FINISHED
    try:
        flags, config = read_flags(argv, PlanFlags)
        chip, count = _chip(flags), device_count(flags.chips, config)
        if chip.platform == "cuda":
            set_flags("gpu")  # the flags of a run on this chip
            if config.train.deterministic:
                request_determinism()
            if config.train.reproducible == "mesh":
                request_reproducibility()
        # These import JAX, which takes seconds.
        from tjx_parallel.planning.step_time import plan
        from tjx_trainer.planning.compiled_step import plan_step
        from tjx_trainer.planning.report import page

        try:
            planned = plan_step(config, chip, count)
        except ValueError as error:
            raise ConfigError(problems_of(error)) from error
    except ConfigError as error:
        exit_with_errors(error)
    found = plan(planned.step, chip, compute_efficiency=flags.compute_efficiency)
    sys.stdout.write(page(config, found, planned))
    if flags.out is not None:
        _, rest, _ = split_command_flags(argv, ["out"])  # plan.json names no local folder
        for file in write(Path(flags.out), config, found, planned, rest):
            sys.stdout.write(f"{file}\n")
    return ExitCode.FINISHED


def write(
    folder: Path, config: Config, found: Any, planned: Any, flags: Sequence[str]
) -> list[Path]:
    """Write plan.json, the HLO and two plots; return the files."""
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
    """Return the installed versions of JAX and its compiler plugins."""
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
    """Parse a command's own flags and the configuration of the run.

    Raises
    ------
    ConfigError
        With all mistakes in either.
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
        problems.append(
            f"--compute_efficiency: got {efficiency:g}; expected a fraction such as 0.5"
        )
    if problems:
        raise ConfigError(problems)
    return kind(**values), config


def read_command_flags(
    own: Mapping[str, str], kind: type, problems: list[Problem | str], *, prefix: str = ""
) -> dict[str, Any]:
    """Convert a command's own flags to values, by field name.

    Parameters
    ----------
    own : mapping of str to str
        Raw values by flag name.
    kind : type
        The dataclass of the flags.
    problems : list of str
        Receives the mistakes.
    prefix : str
        Prefix of the flag names.
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
) -> tuple[dict[str, str], list[str], list[Problem | str]]:
    """Split a command line into a command's own flags, the other arguments, and mistakes.

    Examples
    --------
    >>> split_command_flags(["--chip", "h100", "--model.n_layer=2"], ["chip"])
    ({'chip': 'h100'}, ['--model.n_layer=2'], [])
    """
    found: dict[str, str] = {}
    others: list[str] = []
    problems: list[Problem | str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        name, has_value, value = word.removeprefix("--").partition("=")
        near = nearest_name(name, own, cutoff=0.75)
        is_flag = word.startswith("--") and name not in leaves() and name != "config"
        if not is_flag or not near:
            others.append(word)
            continue
        if not has_value:
            value = words.pop(0) if words and not words[0].startswith("--") else ""
        if name not in own:
            problems.append(f"--{name}: unknown flag; did you mean --{near}?")
        elif name in found:
            problems.append(f"--{name}: given twice; keep one")
        elif not value:
            problems.append(f"--{name}: got no value; expected one")
        else:
            found[name] = value
    return found, others, problems


def command_help(kind: type, *, prefix: str = "") -> str:
    """Describe a command's own flags, whose names start with `prefix`."""
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
    """Return the number of devices of the plan.

    Raises
    ------
    ConfigError
        If the mesh sizes do not match it.
    """
    sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
    count = chips or math.prod(size for size in sizes.values() if size > 0)
    try:
        config.mesh.axis_sizes(count)
    except ValueError as error:
        raise ConfigError([f"--chips {count}: {error}"]) from error
    return count


def _chip(flags: PlanFlags) -> Chip:
    """Return the chip, with the memory fraction of XLA_CLIENT_MEM_FRACTION."""
    chip = find_chip(flags.chip)
    share = os.environ.get("XLA_CLIENT_MEM_FRACTION")
    if share is None or chip.platform != "cuda":
        return chip
    try:
        return chip._replace(usable=float(share))
    except ValueError:
        raise ConfigError(
            [f"XLA_CLIENT_MEM_FRACTION: got {share!r}; expected a fraction such as .92"]
        ) from None
