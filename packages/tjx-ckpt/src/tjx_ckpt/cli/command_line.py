"""The words of the command ``tjx-ckpt`` and what they mean."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tjx_ckpt.cli.terminal import printable

MISTAKE = 2
"""Exit status after a mistake in the command."""

_UNITS = {
    **{"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9},
    **{"KIB": 2**10, "MIB": 2**20, "GIB": 2**30},
}
_DTYPES = ("bfloat16", "float16", "float32", "float64")
_PLACE = "directory of a run or of its checkpoints, or a URL"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return what the words mean; ends the program with a message where they mean nothing."""
    parser = _Parser(
        prog="tjx-ckpt",
        description="Look at checkpoints, check them, compare them, get weights out.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_ls(commands)
    _add_verify(commands)
    _add_diff(commands)
    _add_export(commands)
    return parser.parse_args(arguments)


def tell(problem: object) -> None:
    """Write what is wrong, each line with the name of the command."""
    lines = printable(str(problem)).splitlines() or [type(problem).__name__]
    sys.stderr.write("".join(f"tjx-ckpt: {line}\n" for line in lines))


def read_step(word: str) -> int:
    """Return a step; an argparse.ArgumentTypeError if the word is none."""
    return _whole(word, least=0, example="a step such as 1000")


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in its lines alone, as the trainer does, without the usage around it."""

    def error(self, message: str) -> NoReturn:
        tell(message)
        self.exit(MISTAKE, f"`{self.prog} --help` lists every flag.\n")


def _add_ls(commands: Any) -> None:
    parser = _command(commands, "ls", "what a run holds", "Reads no arrays: it is quick.")
    parser.add_argument("directory", metavar="DIR", help=_PLACE)
    parser.add_argument("--arrays", action="store_true", help="list the arrays of one checkpoint")
    parser.add_argument("--step", type=read_step, help="which, with --arrays [the newest]")
    parser.add_argument("--json", action="store_true", help="for scripts")


def _add_verify(commands: Any) -> None:
    parser = _command(
        commands,
        "verify",
        "whether it is sound",
        "Reads every byte. Exit status: 0 sound, 1 damaged, 2 a mistake in the command.",
    )
    parser.add_argument("directory", metavar="DIR", help=_PLACE)
    parser.add_argument("--step", type=read_step, help="only this one [all]")
    parser.add_argument("--json", action="store_true", help="for scripts")


def _add_diff(commands: Any) -> None:
    parser = _command(
        commands,
        "diff",
        "how two checkpoints differ",
        "Reads and checks every byte that it compares. The change of an array is the norm of the "
        "difference over the norm in A. Exit status: 0 the same arrays bit for bit, 1 different, "
        "2 a mistake in the command or a damaged checkpoint. What is said of them (versions, "
        "metadata, metrics) is shown and does not count.",
    )
    parser.usage = (
        "tjx-ckpt diff [options] DIR STEP STEP\n"
        "       tjx-ckpt diff [options] DIR DIR [--step STEP] [--other_step STEP]"
    )
    parser.add_argument(
        "what",
        nargs="+",
        metavar="DIR STEP STEP | DIR DIR",
        help="two steps of one run, or the newest of two runs",
    )
    parser.add_argument("--step", type=read_step, help="of the first of two runs [the newest]")
    parser.add_argument(
        "--other_step", type=read_step, help="of the second of two runs [the newest]"
    )
    parser.add_argument(
        "--only", default="", metavar="KEY", help="only arrays below, such as params"
    )
    parser.add_argument("--top", type=_count, help="only so many arrays, those that changed most")
    parser.add_argument("--layers", action="store_true", help="show each layer of an array")
    parser.add_argument(
        "--stacked",
        default="blocks",
        metavar="NAME",
        help="part of the keys of arrays whose first axis is the layers [blocks]",
    )
    parser.add_argument("--json", action="store_true", help="for scripts")


def _add_export(commands: Any) -> None:
    parser = _command(
        commands,
        "export",
        "safetensors for other programs",
        "Checks every byte that it reads; writes all or nothing, and over nothing. "
        "Exit status: 0 written, 1 the checkpoint is damaged, 2 a mistake in the command.",
    )
    parser.add_argument("directory", metavar="DIR", help=_PLACE)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors")
    parser.add_argument("--step", type=read_step, help="which [the newest]")
    parser.add_argument(
        "--only",
        default="",
        metavar="KEY",
        help="only arrays below, such as params, which is then left out of their names",
    )
    parser.add_argument("--dtype", choices=_DTYPES, help="for floating-point arrays [as they are]")
    parser.add_argument("--separator", default="/", help="between the parts of a name [/]")
    parser.add_argument(
        "--max_shard_size",
        type=_size,
        default=_size("5GB"),
        metavar="SIZE",
        help="more goes into several files and an index [5GB]",
    )


def _command(commands: Any, name: str, about: str, more: str) -> argparse.ArgumentParser:
    description = f"{about[0].upper()}{about[1:]}. {more}"
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=about, description=description, allow_abbrev=False
    )
    return parser


def _count(word: str) -> int:
    return _whole(word, least=1, example="a number, 1 or more")


def _whole(word: str, *, least: int, example: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", word) or int(word) < least:
        raise argparse.ArgumentTypeError(f"{word!r} was given, expected {example}")
    return int(word)


def _size(word: str) -> int:
    match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?) ?([A-Za-z]*)", word)
    unit = match and _UNITS.get(match[2].upper())
    if not (match and unit) or not (size := int(float(match[1]) * unit)):
        raise argparse.ArgumentTypeError(
            f"{word!r} was given, expected a size such as 5GB, 500MB or 2GiB"
        )
    return size
