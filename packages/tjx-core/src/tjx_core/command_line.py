"""Command-line parser that reports every mistake at once."""

import argparse
import sys
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NoReturn

from tjx_core.problems import ConfigError, Problem, problems_of
from tjx_core.suggestions import unknown_flag, unknown_name

EXIT_USAGE = 2
"""Exit code after a mistake in the command line."""


class CommandParser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` that collects mistakes and accepts no abbreviated flags.

    Values that ``type`` or ``choices`` reject do not stop the parser: all of them, and all unknown
    flags with the nearest right name, are reported together.

    Parameters
    ----------
    problems : list of Problem, optional
        Where mistakes are collected; subcommands share the list of their parser.
    **options
        As for `argparse.ArgumentParser`.

    Examples
    --------
    >>> parser = CommandParser(prog="show", description="Show a run.")
    >>> _ = parser.add_argument("--step", type=whole_number(1))
    >>> _ = parser.add_argument("--json", action="store_true")
    >>> parser.read(["--step", "3"]).step
    3
    >>> parser.read(["--step", "x", "--jsn"])
    Traceback (most recent call last):
    tjx_core.problems.ConfigError: --step: got 'x'; expected a whole number of at least 1
    --jsn: unknown flag; did you mean --json?
    """

    def __init__(self, *, problems: list[Problem] | None = None, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})
        # The parsers of subcommands append to the list of the parser that reads.
        self._problems: list[Problem] = [] if problems is None else problems
        self._commands: Any = None
        self._command_prog = self.prog  # of the subcommand that was read last

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Add an argument as argparse does; errors of ``type`` and ``choices`` are collected.

        Parameters
        ----------
        *names : str
            Flags, or the name of a positional argument.
        **options
            As of `argparse.ArgumentParser.add_argument`.

        Returns
        -------
        argparse.Action
            The argument.
        """
        if (choices := options.pop("choices", None)) is not None:
            options["type"] = one_of(choices)
            options.setdefault("metavar", "{" + ",".join(choices) + "}")
        if (convert := options.pop("type", None)) is not None:
            name = names[0] if names[0].startswith("-") else str(options.get("metavar", names[0]))
            options["type"] = self._collecting(name, convert)
        return super().add_argument(*names, **options)

    def add_subparsers(self, **options: Any) -> Any:
        """Add subcommands, whose parsers are `CommandParser` too.

        Parameters
        ----------
        **options
            As of `argparse.ArgumentParser.add_subparsers`.

        Returns
        -------
        object
            Its `add_parser` adds a subcommand.
        """
        options.setdefault("parser_class", partial(CommandParser, problems=self._problems))
        self._commands = super().add_subparsers(**options)
        return self._commands

    def read(self, words: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse a command line.

        Parameters
        ----------
        words : sequence of str, optional
            The arguments; by default those of the process.

        Returns
        -------
        argparse.Namespace
            The values.

        Raises
        ------
        ConfigError
            With every mistake.
        SystemExit
            With code 0, after ``--help``.
        """
        given = list(sys.argv[1:] if words is None else words)
        command = self._command_of(given)
        self._command_prog = command.prog
        self._problems.clear()
        arguments = argparse.Namespace()
        try:
            arguments, rest = self.parse_known_args(given)
            wrong = [Problem("", f"got {word!r}, which belongs to no flag") for word in rest]
        except _StoppedError as error:
            rest, wrong = given, [error.problem]
        # An unknown flag can be the cause of both.
        wrong = self._unknown_flags(rest, {*self._flags(), *command._flags()}) or wrong
        if problems := [*self._problems, *wrong]:
            raise ConfigError(problems)
        return arguments

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse a command line; print all mistakes and exit with code 2 if there are any.

        Parameters
        ----------
        args : sequence of str, optional
            The command line; by default that of the process.
        namespace : None
            Unused; give defaults to `add_argument`.

        Returns
        -------
        argparse.Namespace
            Values by argument.
        """
        assert namespace is None, "give defaults to add_argument"
        try:
            return self.read(args)
        except ConfigError as error:
            self.fail(error)

    def fail(self, error: Exception) -> NoReturn:
        """Print an error, a line for each of its problems, and exit with code 2.

        Parameters
        ----------
        error : Exception
            Such as the `ConfigError` of values that contradict each other.
        """
        problems = problems_of(error) if isinstance(error, ValueError) else [str(error)]
        lines = [f"{self.prog}: {problem}\n" for problem in problems]
        self.exit(EXIT_USAGE, "".join(lines) + f"`{self._command_prog} --help` lists every flag.\n")

    def error(self, message: str) -> NoReturn:
        """Stop parsing; argparse calls this for mistakes after which it cannot continue.

        Parameters
        ----------
        message : str
            The mistake, as argparse words it.
        """
        raise _StoppedError(Problem("", message.removeprefix("argument ")))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            name = str(action.metavar or action.dest)
            raise _StoppedError(unknown_name(name, str(value), action.choices))

    def _collecting(self, name: str, convert: Callable[[str], Any]) -> Callable[[str], Any]:
        def read(text: str) -> Any:
            try:
                return convert(text)
            except (ValueError, argparse.ArgumentTypeError) as error:
                self._problems.append(Problem(name, str(error)))
                return None

        return read

    def _command_of(self, words: Sequence[str]) -> "CommandParser":
        commands: dict[str, CommandParser] = self._commands.choices if self._commands else {}
        return next((commands[word] for word in words if word in commands), self)

    def _flags(self) -> list[str]:
        return [name for name in self._option_string_actions if name.startswith("--")]

    def _unknown_flags(self, words: Sequence[str], known: Collection[str]) -> list[Problem]:
        names = [word.partition("=")[0] for word in words if word.startswith("--") and word != "--"]
        return [unknown_flag(name, sorted(known)) for name in names if name not in known]


class _StoppedError(Exception):
    """A mistake after which argparse cannot continue."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


def one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """Return a converter for ``type=`` that accepts the given words only.

    Parameters
    ----------
    choices : sequence of str
        The words.

    Returns
    -------
    callable
        Returns the word, or raises ValueError with the nearest one.

    Examples
    --------
    >>> one_of(["float32", "bfloat16"])("bfloat61")
    Traceback (most recent call last):
    ValueError: got 'bfloat61'; expected one of float32, bfloat16; did you mean bfloat16?
    """

    def read(text: str) -> str:
        if text not in choices:
            raise ValueError(unknown_name("", text, choices).message)
        return text

    return read


def whole_number(least: int) -> Callable[[str], int]:
    """Return a converter for ``type=`` that accepts whole numbers of at least `least`.

    Parameters
    ----------
    least : int
        The smallest number.

    Returns
    -------
    callable
        Converts a text to int, or raises ValueError.

    Examples
    --------
    >>> whole_number(1)("12")
    12
    """

    def read(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and len(text) < 19) or int(text) < least:
            raise ValueError(f"got {text!r}; expected a whole number of at least {least}")
        return int(text)

    return read
