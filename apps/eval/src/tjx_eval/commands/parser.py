"""Command lines: argparse, but every mistake is told, and with the nearest right name."""

import argparse
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tjx_eval.errors import EvalError
from tjx_eval.resolve import resolve_model


class Parser(argparse.ArgumentParser):
    """The parser of one command.

    Values that cannot be read do not end it: they are gathered, and `read` tells all at once.
    """

    def __init__(self, *, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        self._problems: list[str] = []

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Add an argument as argparse does; its ``type`` and ``choices`` are read by `read`."""
        choices = options.pop("choices", None)
        convert = options.pop("type", None)
        if choices is not None:
            convert, options["metavar"] = one_of(choices), options.get("metavar", _shown(choices))
        if convert is not None:
            options["type"] = self._gathering(names[0], convert)
        return super().add_argument(*names, **options)

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """Read a command line.

        Raises
        ------
        RunError
            With everything that is wrong, a line each.
        SystemExit
            With code 0, after ``--help``.
        """
        self._problems.clear()
        try:
            arguments, rest = self.parse_known_args(words)
        except _StoppedError as stop:
            # What argparse stumbles on may only follow from a flag that it does not know.
            arguments, rest = argparse.Namespace(), list(words)
            wrong_words = self._unknown(rest) or [str(stop)]
        else:
            wrong_words = self._unknown(rest) or [*map(_stray, rest)]
        if wrong_words:
            wrong_words[-1] += f"; `{self.prog} --help` lists what there is"
        if problems := self._problems + wrong_words:
            raise EvalError("\n".join(problems))
        return arguments

    def error(self, message: str) -> NoReturn:
        """Take note of what argparse cannot go on from."""
        raise _StoppedError(message)

    def _unknown(self, words: Sequence[str]) -> list[str]:
        known = [name for name in self._option_string_actions if name.startswith("--")]
        names = [word.partition("=")[0] for word in words if word.startswith("--") and word != "--"]
        return [
            f"{name}: there is no such flag{did_you_mean(name, known)}"
            for name in names
            if name not in known
        ]

    def _gathering(self, name: str, convert: Callable[[str], Any]) -> Callable[[str], Any]:
        def read(text: str) -> Any:
            try:
                return convert(text)
            except (ValueError, argparse.ArgumentTypeError) as error:
                self._problems.append(f"{name}: {error}" if name.startswith("-") else str(error))
                return None

        return read


class _StoppedError(Exception):
    """Argparse cannot read on."""


def did_you_mean(given: str, allowed: Sequence[str]) -> str:
    """Return ``"; did you mean --json?"`` for the nearest right name, or nothing."""
    near = difflib.get_close_matches(given, allowed, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """Return a reader of one of some words."""

    def read(text: str) -> str:
        if text not in choices:
            raise ValueError(
                f"{text!r} is not one of {', '.join(choices)}{did_you_mean(text, choices)}"
            )
        return text

    return read


def whole_number(least: int) -> Callable[[str], int]:
    """Return a reader of whole numbers of at least so much."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise ValueError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return read


positive = whole_number(1)


def model_folder(text: str) -> str:
    """Return a path that holds a model; a wrong one is told with the other mistakes."""
    resolve_model(Path(text))
    return text


def add_model(parser: Parser) -> None:
    """Add the model that is asked, and which of its parameters and which tokenizer it has."""
    parser.add_argument(
        "model",
        type=model_folder,
        help="a run directory of the trainer, or a folder of transformers",
    )
    parser.add_argument(
        "--step", type=positive, help="a run's checkpoint of this step (default: the newest)"
    )
    parser.add_argument(
        "--tokenizer", metavar="PLACE", help="file or folder of the model's tokenizer"
    )


def picture_file(text: str) -> str:
    """Return the path of a picture that can be drawn."""
    if Path(text).suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"{text!r} is no picture: let it end in .png, .pdf or .svg")
    return text


def _shown(choices: Sequence[str]) -> str:
    return "{" + ",".join(choices) + "}"


def _stray(word: str) -> str:
    return f"{word!r} belongs to no flag"
