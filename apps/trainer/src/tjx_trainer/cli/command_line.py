"""Command line of the trainer: a configuration, a help page, or all mistakes at once."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tjx_core import ConfigError, Problem, printable, problems_of
from tjx_trainer.cli.arguments import resolve
from tjx_trainer.cli.help_page import HELP_FLAGS, help_text
from tjx_trainer.config.run_config import Config, reads_text
from tjx_trainer.runtime.exit_codes import ExitCode
from tjx_trainer.runtime.provenance import versions


def parse(argv: Sequence[str]) -> Config:
    """Parse the command line; exit after ``--help``, ``--version`` or mistakes.

    Parameters
    ----------
    argv : sequence of str
        The arguments after the program's name.

    Returns
    -------
    Config
        Defaults, overridden by the preset, overridden by the flags.

    Raises
    ------
    SystemExit
        With code 2 after printing all mistakes to stderr; with code 0 after ``--help`` or
        ``--version``.
    """
    try:
        if HELP_FLAGS & set(argv):
            sys.stdout.write(help_text(argv))
            raise SystemExit(ExitCode.FINISHED)
        if "--version" in argv:
            lines = [f"{name:<14} {version}" for name, version in versions().items()]
            sys.stdout.write("\n".join(lines) + "\n")
            raise SystemExit(ExitCode.FINISHED)
        return resolve(argv)
    except ConfigError as error:
        exit_with_errors(error)


def check_paths(config: Config) -> None:
    """Raise ConfigError for text files that do not exist, before JAX is imported.

    The content of the files is checked later, by `tjx_data.find_problems`.
    """
    from tjx_data.corpora.files import find_files  # it imports NumPy

    names = [name for name in config.data.weights if config.data.is_path(name)]
    problems: list[Problem] = []
    for name in names if reads_text(config) else ():
        try:
            if not Path(name).expanduser().exists():
                find_files(name)
        except OSError:
            continue  # such as a path that is too long: opening it reports that
        except ValueError as error:
            problems += [problem.within("data") for problem in problems_of(error)]
    if problems:
        raise ConfigError(problems)


def exit_with_errors(error: ConfigError) -> NoReturn:
    """Print all problems to stderr and exit with code 2."""
    sys.stderr.write(format_errors(error))
    raise SystemExit(ExitCode.USER_ERROR)


def format_errors(error: ConfigError) -> str:
    """Format all problems, a bullet each."""
    count = len(error.problems)
    lines = [f"{count} mistake{'s' if count > 1 else ''}, nothing was started:"]
    for problem in error.problems:
        first, *rest = str(problem).splitlines()
        lines += [f"  * {first}", *(f"    {line}" for line in rest)]
    return printable("\n".join([*lines, "`--help` lists every flag and preset."]) + "\n")
