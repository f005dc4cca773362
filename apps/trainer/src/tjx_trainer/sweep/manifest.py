"""Manifest of a sweep: the command line, axes and runs, in ``sweep.json``."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tjx_core import ConfigError, write_atomically
from tjx_data.bounded_io import read_json_object
from tjx_trainer.cli.arguments import parse_args
from tjx_trainer.sweep.grid import Grid

SWEEP_FILE = "sweep.json"
_MOST_BYTES = 16 << 20


def write_manifest(
    folder: Path, grid: Grid, words: Sequence[str], *, kind: str | None = None
) -> None:
    """Write the manifest of a sweep, or of a pipeline: a grid without axes.

    Parameters
    ----------
    folder : Path
        Folder of the runs.
    grid : Grid
        The runs.
    words : sequence of str
        The command line of the runs.
    kind : str, optional
        The subcommand, whose flag ``--KIND.dir`` messages name; by default sweep or pipeline.

    Raises
    ------
    ConfigError
        If the folder holds another sweep, other stages or other files, or cannot be written.
    """
    kind = kind or ("sweep" if grid.axes else "pipeline")
    flag = f"--{kind}.dir"
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
                f"{flag} {folder}: holds another {kind} ({' '.join(before['words'])}); give "
                f"another {flag}, or the same flags (swept values may differ)"
            ])  # fmt: skip
        if changed := [] if grid.axes else _changed_stages(before["runs"], entry["runs"]):
            raise ConfigError([
                f"{flag} {folder}: holds other stages; give them unchanged, or another {flag}:\n"
                + "\n".join(changed)
            ])  # fmt: skip
    elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ConfigError([f"{flag} {folder}: holds other files; give another {flag}"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(entry, indent=2) + "\n")
    except OSError as error:
        raise ConfigError([
            f"{flag} {folder}: cannot be written ({error.strerror}); give another"
        ]) from None  # fmt: skip


def _changed_stages(
    before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Return a line for each difference between the stages of two pipelines."""
    names = [[each["name"] for each in runs] for runs in (before, now)]
    if names[0] != names[1]:
        return [f"stages {', '.join(names[0])} there, {', '.join(names[1])} here"]
    return [
        f"{old['name']}: {key}: {old['settings'].get(key, 'unset')} there, "
        f"{new['settings'].get(key, 'unset')} here"
        for old, new in zip(before, now, strict=True)
        for key in sorted(old["settings"].keys() | new["settings"].keys())
        if old["settings"].get(key) != new["settings"].get(key)
    ]


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
