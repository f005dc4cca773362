"""What a sweep is made of, as it stands in its folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tjx_data.bounded_io import read_json_object
from tjx_trainer.cli.command_line import parse_args
from tjx_trainer.config.run_config import ConfigError
from tjx_trainer.sweep.grid import Grid

SWEEP_FILE = "sweep.json"
_MOST_BYTES = 16 << 20


def write_manifest(folder: Path, grid: Grid, words: Sequence[str]) -> None:
    """Write what the sweep is made of.

    Raises
    ------
    ConfigError
        If the folder holds another sweep or something else, or cannot be made.
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
                "another --sweep.dir, or the same flags (the values that are swept may be others)"
            ])  # fmt: skip
    elif folder.is_dir() and any(folder.iterdir()):
        raise ConfigError([f"--sweep.dir {folder}: holds files of something else; give another"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError([
            f"--sweep.dir {folder}: cannot be written ({error.strerror}); give another"
        ]) from None  # fmt: skip


def _fixed(entry: dict[str, Any]) -> dict[str, str]:
    """Return what all runs of a sweep have in common."""
    words = parse_args(entry["words"])
    given = {"config": words.config, **{name: str(v.raw) for name, v in words.values.items()}}
    return {name: value for name, value in given.items() if name not in entry["axes"]}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read what `record_sweep` wrote.

    Raises
    ------
    ConfigError
        If there is no sweep.
    """
    try:
        return read_json_object(folder / SWEEP_FILE, _MOST_BYTES)
    except FileNotFoundError:
        inside = sorted(p.parent for p in folder.parent.glob(f"*/{SWEEP_FILE}"))
        hint = f"; there are {', '.join(map(str, inside))}" if inside else ""
        raise ConfigError([f"{folder}: holds no sweep (no {SWEEP_FILE}){hint}"]) from None
    except (OSError, ValueError) as error:
        raise ConfigError([f"{folder / SWEEP_FILE}: cannot be read ({error})"]) from None
