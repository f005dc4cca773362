"""``trainer sweep``: train a grid of configurations and compare the results."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Literal

from tjx_core import ConfigError
from tjx_trainer.cli.command_line import exit_with_errors
from tjx_trainer.planning.plan_command import command_help, read_command_flags, split_command_flags
from tjx_trainer.runtime.exit_codes import ExitCode
from tjx_trainer.sweep.grid import SweepRun, read_grid
from tjx_trainer.sweep.manifest import write_manifest

_PROGRAM = (sys.executable, "-m", "tjx_trainer.main")

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

Launch = Callable[[Sequence[str]], int]


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
    code, failed = _run_all(folder, grid.combinations, launch or _launch)
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


def _run_all(
    folder: Path, combinations: Sequence[SweepRun], launch: Launch
) -> tuple[int, dict[str, int]]:
    """Train each unfinished run; a failed run does not stop the others.

    Returns
    -------
    tuple
        The exit code, and the exit codes of failed runs by name.
    """
    from tjx_trainer.sweep.results import is_finished

    failed: dict[str, int] = {}
    for number, each in enumerate(combinations, 1):
        place = folder / each.name
        head = f"sweep          {number} of {len(combinations)}: {each.name}"
        if is_finished(place):
            sys.stderr.write(f"{head}, already finished\n")
            continue
        sys.stderr.write(f"{head}\n")
        code = launch([*each.words, f"--run_dir={place}"])
        if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            sys.stderr.write("sweep          stopped; run the same command to continue\n")
            return code, failed
        if code:
            sys.stderr.write(f"sweep          {each.name} failed with exit code {code}\n")
            failed[each.name] = code
    return next(iter(failed.values()), ExitCode.FINISHED), failed


def _launch(words: Sequence[str]) -> int:
    """Train a run in a new process, forwarding stop signals to it."""
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)
    with subprocess.Popen([*_PROGRAM, *words], env={**os.environ, "PYTHONPATH": path}) as process:

        def pass_on(number: int, frame: FrameType | None) -> None:
            assert frame is None or frame
            # The terminal sends Ctrl-C to the run as well.
            if number != signal.SIGINT:
                process.send_signal(number)

        before = {s: signal.signal(s, pass_on) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return code if code >= 0 else 128 - code
