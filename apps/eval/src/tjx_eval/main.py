"""Asks questions of a trained model: a run of the trainer, or a folder of transformers.

Each command is a module of this package with `add_arguments` and `run`. They import what is heavy
when they run, so that a mistake in the command line is answered at once.
"""

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

from tjx_ckpt.cli.terminal import printable
from tjx_ckpt.errors import CheckpointError, UnreadableError, advice
from tjx_core import ConfigError
from tjx_data.corpora.hub import HubError
from tjx_data.errors import DataError
from tjx_eval.commands import attention, compare, export, generate, loss, nanogpt, serve, tasks
from tjx_eval.commands.parser import Parser, did_you_mean
from tjx_eval.errors import EvalError

COMMANDS: dict[str, ModuleType] = {
    "loss": loss,
    "compare": compare,
    "attention": attention,
    "generate": generate,
    "tasks": tasks,
    "export": export,
    "serve": serve,
}

EXIT_USER_ERROR = 2
EXIT_SYSTEM = 5
EXIT_UNREADABLE = 11


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code.

    2: a mistake of the user's; 5: the system refused to read or write a file; 11: a checkpoint
    cannot be read now.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(help_text())
        return 0 if words else EXIT_USER_ERROR
    try:
        if nanogpt.MODE in words:
            words = nanogpt.translate(words)
        command, arguments = read(words)
        code: int = command.run(arguments)
    except (EvalError, ConfigError, CheckpointError, HubError, DataError) as error:
        sys.stderr.write("".join(f"error: {line}\n" for line in told(error)))
        return EXIT_UNREADABLE if isinstance(error, UnreadableError) else EXIT_USER_ERROR
    except OSError as error:
        if error.errno is None:  # no answer of the system but a fault of ours
            raise
        hint = [advice(error)] if advice(error) else []
        sys.stderr.write(printable("; ".join([f"error: {error}", *hint])) + "\n")
        return EXIT_SYSTEM
    return code


def read(words: Sequence[str]) -> tuple[ModuleType, argparse.Namespace]:
    """Return the command that a command line names, and its arguments.

    Raises
    ------
    RunError
        With everything that is wrong, a line each.
    """
    name, *rest = words
    if name not in COMMANDS:
        raise EvalError(
            f"{name}: there is no such command{did_you_mean(name, list(COMMANDS))}; "
            f"there are {', '.join(COMMANDS)}"
        )
    command = COMMANDS[name]
    parser = Parser(prog=f"eval {name}", description=command.__doc__ or "")
    command.add_arguments(parser)
    return command, parser.read(rest)


def told(error: BaseException) -> list[str]:
    """Return what to tell of an error, a line for each mistake."""
    return printable("; ".join([str(error), *getattr(error, "__notes__", [])])).splitlines()


def help_text() -> str:
    """Describe the commands."""
    lines = [f"  {name:<12}{_first_line(command)}" for name, command in COMMANDS.items()]
    head = ["usage: eval COMMAND MODEL [--flag value] ...", "", __doc__.splitlines()[0], ""]
    foot = [
        "",
        "`eval COMMAND --help` tells of each.",
        "`eval --nanogpt --out_dir=out ...` takes the flags of nanoGPT's sample.py.",
    ]
    return "\n".join([*head, *lines, *foot]) + "\n"


def _first_line(command: ModuleType) -> str:
    return (command.__doc__ or "").splitlines()[0].partition(": ")[2]


if __name__ == "__main__":
    sys.exit(main())
