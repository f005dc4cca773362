"""Manifest of a sweep: the command line, axes and runs, in ``sweep.json``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tjx_core import ConfigError
from tjx_data.bounded_io import read_json_object
from tjx_trainer.cli.arguments import parse_args
from tjx_trainer.sweep.grid import Grid

SWEEP_FILE = "sweep.json"
_MOST_BYTES = 16 << 20


def write_manifest(folder: Path, grid: Grid, words: Sequence[str]) -> None:
    """Write the manifest.

    Raises
    ------
    ConfigError
        If the folder holds another sweep or other files, or cannot be written.
    """
    entry: dict[str, Any] = {
        "words": list(words),
        "axes": {name: list(values) for name, values in grid.axes.items()},
        "runs": [{"name": e.name, "settings": dict(e.settings)} for e in grid.combinations],
    }
    file = folder / SWEEP_FILE
    if file.exists():
        before = read_manifest(folder)
        if before["axes"].keys() != entry["axes"].keys() or _fixed(before) != _fixed(entry):
            raise ConfigError([
                f"--sweep.dir {folder}: holds another sweep ({' '.join(before['words'])}); give "
                "another --sweep.dir, or the same flags (swept values may differ)"
            ])  # fmt: skip
    elif folder.is_dir() and any(folder.iterdir()):
        raise ConfigError([f"--sweep.dir {folder}: holds other files; give another --sweep.dir"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError([
            f"--sweep.dir {folder}: cannot be written ({error.strerror}); give another"
        ]) from None  # fmt: skip


def _fixed(entry: dict[str, Any]) -> dict[str, str]:
    """Return the flags that all runs of a sweep share."""
    words = parse_args(entry["words"])
    given = {"config": words.config, **{name: str(v.raw) for name, v in words.values.items()}}
    return {name: value for name, value in given.items() if name not in entry["axes"]}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a sweep.

    Raises
    ------
    ConfigError
        If there is none.
    """
    try:
        return read_json_object(folder / SWEEP_FILE, _MOST_BYTES)
    except FileNotFoundError:
        inside = sorted(p.parent for p in folder.parent.glob(f"*/{SWEEP_FILE}"))
        hint = f"; there are {', '.join(map(str, inside))}" if inside else ""
        raise ConfigError([f"{folder}: holds no sweep (no {SWEEP_FILE}){hint}"]) from None
    except (OSError, ValueError) as error:
        raise ConfigError([f"{folder / SWEEP_FILE}: cannot be read ({error})"]) from None
