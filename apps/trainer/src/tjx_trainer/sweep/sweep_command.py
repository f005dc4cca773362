"""`trainer sweep`: the same run with several values of some flags, compared at the end."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Literal

from tjx_trainer.cli.command_line import exit_with_errors
from tjx_trainer.config.run_config import ConfigError
from tjx_trainer.planning.plan_command import command_help, read_command_flags, split_command_flags
from tjx_trainer.runtime.exit_codes import ExitCode
from tjx_trainer.sweep.grid import SweepRun, read_grid
from tjx_trainer.sweep.manifest import write_manifest

_PROGRAM = (sys.executable, "-m", "tjx_trainer.main")

_HELP = """\
usage: trainer sweep [--config NAME_OR_PATH] --section.name VALUE,VALUE,... ... [--sweep.dir DIR]
       trainer sweep --summary DIR

Makes a run of every combination of the values, one after another, and compares them in a table and
in pictures. Numbers, choices and truth values are separated by commas; texts and lists, which may
hold commas themselves, by semicolons: --data.path 'a.txt;b.txt'. The same command again goes on
with what is not finished.

"""


@dataclass(frozen=True, kw_only=True)
class SweepFlags:
    """What is told beside the runs' own flags.

    Attributes
    ----------
    dir
        Folder of the sweep, with one for each run; none: runs/sweep-NAME, by the preset's name.
    metric
        What is compared: the last value of this metric, the smallest being the best.
    launcher
        How runs are started: local (here, one after another), or slurm (an array of jobs).
    submit
        Whether the SLURM array is submitted; else its file is only written.
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
    """Make the runs of a sweep, or write them as a SLURM array.

    Parameters
    ----------
    argv : sequence of str
        The words after ``sweep``.
    launch : callable, optional
        Makes one run of its command line and returns its exit code; by default another process.

    Returns
    -------
    int
        0 when all runs are finished; the exit code of the first that failed; 128 and the signal's
        number when asked to stop.

    Raises
    ------
    SystemExit
        With code 2 after everything that is wrong was written to stderr.
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
    """Divide the words into the sweep's own flags, those of its runs, and what to sum up."""
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
    """Make each run that is not finished; one that fails does not keep the others from it.

    Returns
    -------
    tuple
        The exit code, and those of the runs that failed, by name.
    """
    from tjx_trainer.sweep.results import is_finished

    failed: dict[str, int] = {}
    for number, each in enumerate(combinations, 1):
        place = folder / each.name
        head = f"sweep          {number} of {len(combinations)}: {each.name}"
        if is_finished(place):
            sys.stderr.write(f"{head}, finished before\n")
            continue
        sys.stderr.write(f"{head}\n")
        code = launch([*each.words, f"--run_dir={place}"])
        if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            sys.stderr.write("sweep          stopped; the same command goes on\n")
            return code, failed
        if code:
            sys.stderr.write(f"sweep          {each.name} failed with exit code {code}\n")
            failed[each.name] = code
    return next(iter(failed.values()), ExitCode.FINISHED), failed


def _launch(words: Sequence[str]) -> int:
    """Make a run in a process of its own; a signal to stop is for that process."""
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)
    with subprocess.Popen([*_PROGRAM, *words], env={**os.environ, "PYTHONPATH": path}) as process:

        def pass_on(number: int, frame: FrameType | None) -> None:
            assert frame is None or frame
            # Ctrl-C reaches the run by itself: a terminal sends it to all processes.
            if number != signal.SIGINT:
                process.send_signal(number)

        before = {s: signal.signal(s, pass_on) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return code if code >= 0 else 128 - code
