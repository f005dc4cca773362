"""``trainer pipeline``: train a list of stages, each from the result of the one before."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from tjx_core import ConfigError, write_atomically
from tjx_trainer.cli.command_line import exit_with_errors
from tjx_trainer.pipeline.stages import pipeline_names, read_pipeline
from tjx_trainer.planning.plan_command import command_help, read_command_flags, split_command_flags
from tjx_trainer.runtime.exit_codes import ExitCode
from tjx_trainer.sweep.grid import Grid
from tjx_trainer.sweep.launch import Launch, launch_run, run_all
from tjx_trainer.sweep.manifest import write_manifest

REPORT = "report.html"
_PREFIX = "pipeline."
_HELP = """\
usage: trainer pipeline --config NAME_OR_PATH [--pipeline.dir DIR] [--section.name VALUE] ...

Trains the stages of a YAML list, each from the result of the one before, and writes one report. A
stage is an ordinary run in a folder below that of the pipeline. Repeat the same command to resume.
Flags apply to every stage. Shipped pipelines: {}.

"""


@dataclass(frozen=True, kw_only=True)
class PipelineFlags:
    """Flags of `trainer pipeline` besides those of the stages.

    Attributes
    ----------
    dir
        Folder of the pipeline, with a folder per stage; none: runs/pipeline-NAME.
    """

    dir: str | None = None


def run(argv: Sequence[str], *, launch: Launch | None = None) -> int:
    """Train the stages of a pipeline that are not finished, and write the report.

    Parameters
    ----------
    argv : sequence of str
        The arguments after ``pipeline``.
    launch : callable, optional
        From the arguments of one run to its exit code; by default in a new process.

    Returns
    -------
    int
        0 after the last stage; the exit code of the stage that failed; 128 + the signal's number
        after a stop request.

    Raises
    ------
    SystemExit
        With code 2 after printing all mistakes; nothing was started.
    """
    if {"--help", "-h"} & set(argv):
        help_page = _HELP.format(", ".join(pipeline_names()))
        sys.stdout.write(help_page + command_help(PipelineFlags, prefix=_PREFIX))
        return ExitCode.FINISHED
    try:
        folder, grid, words = _read(argv)
        write_manifest(folder, grid, words)
    except ConfigError as error:
        exit_with_errors(error)
    code, _ = run_all(
        folder, grid.combinations, launch or launch_run, command="pipeline", stop_at_failure=True
    )
    if code:
        return code
    _report(folder, grid)
    return ExitCode.FINISHED


def _read(argv: Sequence[str]) -> tuple[Path, Grid, list[str]]:
    """Return the folder, the stages, and the arguments besides the folder."""
    names = [_PREFIX + field.name for field in fields(PipelineFlags)]
    own, rest, problems = split_command_flags(argv, names)
    flags = PipelineFlags(**read_command_flags(own, PipelineFlags, problems, prefix=_PREFIX))
    chosen, rest_of_stages, more = _split_config(rest)
    problems += more
    if problems:
        raise ConfigError(problems)
    folder = None if flags.dir is None else Path(flags.dir)
    grid = read_pipeline(chosen, rest_of_stages, folder)
    return folder or Path("runs") / f"pipeline-{grid.config.name}", grid, rest


def _split_config(words: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """Return the value of ``--config``, the other arguments, and mistakes."""
    found, rest, left = list[str](), list[str](), list(words)
    while left:
        word = left.pop(0)
        name, has_value, value = word.partition("=")
        if name != "--config":
            rest.append(word)
        elif has_value or left:
            found.append(value if has_value else left.pop(0))
    if len(found) == 1:
        return found[0], rest, []
    known = ", ".join(pipeline_names())
    return "", rest, [f"--config: got {found or 'none'}; expected one path, or one of {known}"]


def _report(folder: Path, grid: Grid) -> None:
    """Write the report of all stages, and print where it is and how to chat."""
    from tjx_metrics.plotting.run_data import open_run
    from tjx_metrics.report.page import pipeline_page

    stages = [open_run(folder / stage.name, stage.name) for stage in grid.combinations]
    page = folder / REPORT
    write_atomically(page, pipeline_page(grid.config.name, stages))
    last = folder / grid.combinations[-1].name
    lines = [f"report         {page}"]
    if (last / "chat_template.jinja").is_file():
        lines.append(
            f"chat           ./pants run apps/eval -- generate {shlex.quote(str(last))} --chat "
            "--interactive --temperature 0"
        )
    sys.stdout.write("\n".join(lines) + "\n")
