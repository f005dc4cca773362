"""``trainer sweep``: train a grid of configurations and compare the results."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from tjx_core import ConfigError
from tjx_trainer.cli.command_line import exit_with_errors
from tjx_trainer.planning.plan_command import command_help, read_command_flags, split_command_flags
from tjx_trainer.runtime.exit_codes import ExitCode
from tjx_trainer.sweep.grid import read_grid
from tjx_trainer.sweep.launch import Launch, launch_run, run_all
from tjx_trainer.sweep.manifest import write_manifest

_HELP = """\
usage: trainer sweep [--config NAME_OR_PATH] --section.name VALUE,VALUE,... ... [--sweep.dir DIR]
       trainer sweep --summary DIR

Trains every combination of the values, one after another, and compares them in a table and plots.
Separate numbers, choices and booleans by commas; text and lists, which may contain commas, by
semicolons: --data.path 'a.txt;b.txt'. Repeat the same command to continue an interrupted sweep.

"""


@dataclass(frozen=True, kw_only=True)
class SweepFlags:
    """Flags of `trainer sweep` besides those of the runs.

    Attributes
    ----------
    dir
        Folder of the sweep, with a folder per run; none: runs/sweep-NAME, by the preset's name.
    metric
        Metric to compare: its last value, smaller is better.
    launcher
        How runs are started: local (one after another) or slurm (a job array).
    submit
        Whether to submit the SLURM array; otherwise only its script is written.
    options
        Options for sbatch, separated by semicolons, such as '--gpus=1;--time=02:00:00'.
    """

    dir: str | None = None
    metric: str = "eval/loss"
    launcher: Literal["local", "slurm"] = "local"
    submit: bool = False
    options: str | None = None


_PREFIX, _SUMMARY = "sweep.", "summary"


def run(argv: Sequence[str], *, launch: Launch | None = None) -> int:
    """Train the runs of a sweep, or write them as a SLURM array.

    Parameters
    ----------
    argv : sequence of str
        The arguments after ``sweep``.
    launch : callable, optional
        From the arguments of one run to its exit code; by default in a new process.

    Returns
    -------
    int
        0 if all runs finished; the exit code of the first that failed; 128 + the signal's number
        after a stop request.

    Raises
    ------
    SystemExit
        With code 2 after printing all mistakes.
    """
    if {"--help", "-h"} & set(argv):
        sys.stdout.write(_HELP + command_help(SweepFlags, prefix=_PREFIX))
        return ExitCode.FINISHED
    try:
        flags, rest, summary = _read_flags(argv)
        if summary is not None:
            return _summarize(Path(summary), flags.metric)
        grid = read_grid(rest)
        folder = Path(flags.dir or Path("runs") / f"sweep-{grid.config.name}")
        write_manifest(folder, grid, rest)
    except ConfigError as error:
        exit_with_errors(error)
    if flags.launcher == "slurm":
        from tjx_trainer.sweep.slurm import write_array

        return write_array(folder, grid, options=flags.options, submit=flags.submit)
    code, failed = run_all(folder, grid.combinations, launch or launch_run, command="sweep")
    from tjx_trainer.sweep.report import report

    try:
        report(folder, metric=flags.metric, failed=failed)
    except ConfigError as error:
        exit_with_errors(error)
    return code


def _read_flags(argv: Sequence[str]) -> tuple[SweepFlags, list[str], str | None]:
    """Split the arguments into the sweep's own flags, those of its runs, and ``--summary``."""
    submit = f"--{_PREFIX}submit"
    words = [f"{word}=true" if word == submit else word for word in argv]
    names = [_PREFIX + field.name for field in fields(SweepFlags)]
    own, rest, problems = split_command_flags(words, [*names, _SUMMARY])
    summary = own.pop(_SUMMARY, None)
    flags = SweepFlags(**read_command_flags(own, SweepFlags, problems, prefix=_PREFIX))
    if flags.launcher == "local" and (flags.submit or flags.options):
        problems.append(f"{submit} and --{_PREFIX}options are for --{_PREFIX}launcher slurm")
    if summary is not None and rest:
        problems.append(f"--{_SUMMARY} runs nothing, and {rest[0]} is for runs: leave one out")
    if problems and summary is None:
        try:
            read_grid(rest)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return flags, rest, summary


def _summarize(folder: Path, metric: str) -> int:
    from tjx_trainer.sweep.report import report

    report(folder, metric=metric)
    return ExitCode.FINISHED
