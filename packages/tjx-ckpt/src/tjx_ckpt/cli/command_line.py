"""Arguments of the command ``tjx-ckpt``."""

import argparse
import re
from pathlib import Path
from typing import Any

from tjx_core import CommandParser, whole_number

_UNITS = {
    **{"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9},
    **{"KIB": 2**10, "MIB": 2**20, "GIB": 2**30},
}
_DTYPES = ("bfloat16", "float16", "float32", "float64")
_DIRECTORY = "run directory, checkpoint directory, or URL"

step_number = whole_number(0)
"""Converter of a step; raises ValueError for other text."""


def make_parser() -> CommandParser:
    """Return the parser of all subcommands."""
    parser = CommandParser(
        prog="tjx-ckpt", description="List, verify, compare, export and import checkpoints."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_ls(commands)
    _add_verify(commands)
    _add_diff(commands)
    _add_export(commands)
    _add_import(commands)
    return parser


def _add_ls(commands: Any) -> None:
    parser = _command(commands, "ls", "list checkpoints", "Reads manifests only.")
    parser.add_argument("directory", metavar="DIR", help=_DIRECTORY)
    parser.add_argument("--arrays", action="store_true", help="list the arrays of one checkpoint")
    parser.add_argument("--step", type=step_number, help="step for --arrays [the newest]")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_verify(commands: Any) -> None:
    parser = _command(
        commands,
        "verify",
        "verify checksums",
        "Reads every byte. Exit code: 0 intact, 1 damaged, 2 usage error.",
    )
    parser.add_argument("directory", metavar="DIR", help=_DIRECTORY)
    parser.add_argument("--step", type=step_number, help="step to verify [all]")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_diff(commands: Any) -> None:
    parser = _command(
        commands,
        "diff",
        "compare two checkpoints",
        "Reads and verifies every byte that it compares. The change of an array is the norm of the "
        "difference over the norm in A. Exit code: 0 bitwise equal arrays, 1 different, 2 usage "
        "error or a damaged checkpoint. Differences of versions, metadata and metrics are shown "
        "and do not count.",
    )
    parser.usage = (
        "tjx-ckpt diff [options] DIR STEP STEP\n"
        "       tjx-ckpt diff [options] DIR DIR [--step STEP] [--other_step STEP]"
    )
    parser.add_argument(
        "what",
        nargs="+",
        metavar="DIR STEP STEP | DIR DIR",
        help="two steps of one run, or the newest steps of two runs",
    )
    parser.add_argument("--step", type=step_number, help="step of the first run [the newest]")
    parser.add_argument("--other_step", type=step_number, help="of the second run [the newest]")
    parser.add_argument(
        "--only", default="", metavar="KEY", help="compare arrays at or below a key such as params"
    )
    parser.add_argument("--top", type=whole_number(1), help="show the N arrays that changed most")
    parser.add_argument("--layers", action="store_true", help="show each layer of stacked arrays")
    parser.add_argument(
        "--stacked",
        default="blocks",
        metavar="NAME",
        help="key part of arrays whose first axis is the layer [blocks]",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_export(commands: Any) -> None:
    parser = _command(
        commands,
        "export",
        "export arrays as safetensors or for Orbax",
        "Verifies every byte that it reads; writes all files or none, and overwrites none. The "
        "format orbax holds all arrays in memory and imports JAX. "
        "Exit code: 0 written, 1 the checkpoint is damaged, 2 usage error.",
    )
    parser.add_argument("directory", metavar="DIR", help=_DIRECTORY)
    parser.add_argument(
        "--format", choices=("safetensors", "orbax"), default="safetensors", help="[safetensors]"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="PATH",
        help="FILE.safetensors, or a new folder for the format orbax",
    )
    parser.add_argument("--step", type=step_number, help="step to export [the newest]")
    parser.add_argument(
        "--only",
        default="",
        metavar="KEY",
        help="export arrays at or below a key such as params, without it in their names",
    )
    parser.add_argument(
        "--dtype", choices=_DTYPES, help="dtype of floating-point arrays [as saved]"
    )
    parser.add_argument("--separator", default="/", help="separator of key parts in names [/]")
    parser.add_argument(
        "--max_shard_size",
        type=_size,
        default=_size("5GB"),
        metavar="SIZE",
        help="maximum file size; larger exports get several files and an index [5GB]",
    )


def _add_import(commands: Any) -> None:
    parser = _command(
        commands,
        "import",
        "import an Orbax checkpoint",
        "Reads arrays bit for bit into memory and saves them as a checkpoint. Imports JAX. "
        "Exit code: 0 written, 2 usage error.",
    )
    parser.add_argument(
        "orbax",
        type=Path,
        metavar="ORBAX_DIR",
        help="folder of an Orbax checkpoint, of a step, or of all steps (the newest is imported)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="checkpoint directory"
    )
    parser.add_argument(
        "--step", type=step_number, help="step of the new checkpoint [that of ORBAX_DIR, or 0]"
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="KEY",
        help="import arrays at or below a key such as params/params, without it in their names",
    )


def _command(commands: Any, name: str, summary: str, details: str) -> argparse.ArgumentParser:
    description = f"{summary[0].upper()}{summary[1:]}. {details}"
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=description
    )
    return parser


def _size(word: str) -> int:
    match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?) ?([A-Za-z]*)", word)
    unit = match and _UNITS.get(match[2].upper())
    if not (match and unit) or not (size := int(float(match[1]) * unit)):
        raise ValueError(f"got {word!r}; expected a size; try 5GB, 500MB or 2GiB")
    return size
