"""Evaluate, sample from, export and serve a trained model.

Each command is a module of `tjx_eval.commands` with `add_arguments` and `run`. Commands import JAX
inside `run`, so that command-line errors are reported at once.
"""

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

from tjx_ckpt.errors import CheckpointError, UnreadableError, advice
from tjx_core import CommandParser, ConfigError, printable, unknown_name
from tjx_data.corpora.hub import HubError
from tjx_data.errors import DataError
from tjx_eval import __version__
from tjx_eval.commands import (
    attention,
    compare,
    core,
    doctor,
    export,
    generate,
    loss,
    nanogpt,
    pass_at_k,
    serve,
    tasks,
)
from tjx_eval.errors import EvalError

COMMANDS: dict[str, ModuleType] = {
    "loss": loss,
    "compare": compare,
    "attention": attention,
    "generate": generate,
    "pass_at_k": pass_at_k,
    "tasks": tasks,
    "core": core,
    "export": export,
    "doctor": doctor,
    "serve": serve,
}

EXIT_USER_ERROR = 2
EXIT_SYSTEM = 5
EXIT_UNREADABLE = 11
_USER_ERRORS = (EvalError, ConfigError, CheckpointError, HubError, DataError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    2: user error; 5: the operating system refused to read or write a file; 11: a checkpoint cannot
    be read at the moment.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(help_text())
        return 0 if words else EXIT_USER_ERROR
    if words == ["--version"]:
        sys.stdout.write(f"tjx-eval {__version__}\n")
        return 0
    try:
        if nanogpt.FLAG in words and {"-h", "--help"} & set(words):
            sys.stdout.write(nanogpt.help_text())
            return 0
        if nanogpt.FLAG in words:
            words = nanogpt.translate(words)
        command, arguments = parse(words)
        code: int = command.run(arguments)
    except _USER_ERRORS as error:
        sys.stderr.write("".join(f"error: {line}\n" for line in _error_lines(error)))
        return EXIT_UNREADABLE if isinstance(error, UnreadableError) else EXIT_USER_ERROR
    except OSError as error:
        if error.errno is None:  # not an error of the operating system
            raise
        hint = [advice(error)] if advice(error) else []
        sys.stderr.write(printable("; ".join([f"error: {error}", *hint])) + "\n")
        return EXIT_SYSTEM
    return code


def parse(words: Sequence[str]) -> tuple[ModuleType, argparse.Namespace]:
    """Return the module of a command and its parsed arguments.

    Raises
    ------
    ConfigError
        With every mistake in the command line.
    """
    name, *rest = words
    if name not in COMMANDS:
        raise ConfigError([unknown_name("COMMAND", name, COMMANDS)])
    command = COMMANDS[name]
    parser = CommandParser(prog=f"eval {name}", description=command.__doc__ or "")
    command.add_arguments(parser)
    return command, parser.read(rest)


def help_text() -> str:
    """Return the overview of all commands."""
    lines = [f"  {name:<12}{_summary(command)}" for name, command in COMMANDS.items()]
    head = ["usage: eval COMMAND MODEL [--flag value] ...", "", (__doc__ or "").splitlines()[0], ""]
    foot = [
        "",
        "`eval COMMAND --help` describes the flags of a command.",
        "`eval --nanogpt --out_dir=out ...` accepts the flags of nanoGPT's sample.py.",
    ]
    return "\n".join([*head, *lines, *foot]) + "\n"


def _summary(command: ModuleType) -> str:
    return (command.__doc__ or "").splitlines()[0].partition(": ")[2]


def _error_lines(error: BaseException) -> list[str]:
    return printable("; ".join([str(error), *getattr(error, "__notes__", [])])).splitlines()


if __name__ == "__main__":
    sys.exit(main())
