"""Subcommand ``ls``: checkpoints of a directory and arrays of a checkpoint."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from tjx_ckpt.cli.key_paths import in_order, is_below
from tjx_ckpt.cli.terminal import (
    WIDTH,
    human_bytes,
    human_count,
    human_number,
    shape_text,
    shorten,
    table,
)
from tjx_ckpt.lookup import Checkpoint
from tjx_ckpt.store.local_folder import LocalFolder
from tjx_ckpt.store.manifest import MANIFEST_NAME, Manifest, ManifestError
from tjx_ckpt.store.manifest import read as read_manifest
from tjx_ckpt.store.storage import Storage

_FIRST_METRIC = "eval/loss"


@dataclass(frozen=True)
class ListedCheckpoint:
    """A row of the list of checkpoints.

    Attributes
    ----------
    step
        Step; rows are sorted by it.
    size_bytes
        Size of the array files; None: unknown.
    written
        Modification time of the manifest by the clock of its file system; None: unknown.
    arrays
        Number of arrays; None: unknown.
    parameters
        Number of elements of the arrays below ``params``; None: no such arrays.
    metrics
        Metrics of the step.
    damage
        Problem of the manifest; None: intact. Arrays are not verified.
    """

    step: int
    size_bytes: int | None = None
    written: datetime | None = None
    arrays: int | None = None
    parameters: int | None = None
    metrics: Mapping[str, float] | None = None
    damage: str | None = None


def list_checkpoints(storage: Storage) -> list[ListedCheckpoint]:
    """Return the existing checkpoints, intact or damaged, ascending by step."""
    found = []
    for step in storage.steps():
        try:
            found.append(_entry(storage, read_manifest(storage, step)))
        except ManifestError as error:
            if storage.exists(step):  # otherwise the run deleted it meanwhile
                found.append(ListedCheckpoint(step, damage=f"{MANIFEST_NAME}: {error}"))
    return found


def list_text(storage: Storage) -> str:
    """Return a table of the checkpoints, and lists of damaged ones and leftovers."""
    found = list_checkpoints(storage)
    total = sum(entry.size_bytes or 0 for entry in found)
    word = "checkpoint" if len(found) == 1 else "checkpoints"
    lines = [f"{storage}: {len(found)} {word}, {human_bytes(total)}"]
    intact = [entry for entry in found if entry.damage is None]
    if intact:
        lines += ["", *_table(intact)]
    damaged = [f"step {entry.step}: {entry.damage}" for entry in found if entry.damage is not None]
    holder = storage.lock.holder()
    for title, items in (
        ("damaged", damaged),
        ("renamed as damaged", storage.quarantined()),
        ("left by a killed save, or a save in progress", storage.leftovers()),
        ("current writer", [holder] if holder else []),
    ):
        if items:
            lines += ["", title, *(f"  {item}" for item in items)]
    return "\n".join(lines)


def list_json(storage: Storage) -> dict[str, Any]:
    """Return the content of `list_text` as plain JSON."""
    found = []
    for entry in list_checkpoints(storage):
        written = entry.written and entry.written.isoformat(timespec="seconds")
        metrics = {name: plain(value) for name, value in (entry.metrics or {}).items()}
        found.append({**asdict(entry), "written": written, "metrics": metrics})
    return {
        "directory": str(storage),
        "checkpoints": found,
        "set_aside": storage.quarantined(),
        "leftovers": storage.leftovers(),
        "writer": storage.lock.holder(),
    }


def arrays_text(checkpoint: Checkpoint) -> str:
    """Return a table of the arrays of a checkpoint."""
    leaves = checkpoint.manifest.leaves
    total = sum(leaf.size_bytes for leaf in leaves.values())
    rows = [("array", "shape", "dtype", "size")]
    for key in in_order(leaves):
        leaf = leaves[key]
        rows.append((key, shape_text(leaf.shape), leaf.dtype, human_bytes(leaf.size_bytes)))
    title = f"{checkpoint.name}: {len(leaves)} arrays, {human_bytes(total)}"
    return "\n".join([title, "", *table(rows)])


def arrays_json(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the content of `arrays_text` as plain JSON."""
    leaves = checkpoint.manifest.leaves
    arrays = [
        {
            "key": key,
            "shape": list(leaves[key].shape),
            "dtype": leaves[key].dtype,
            "size_bytes": leaves[key].size_bytes,
        }
        for key in in_order(leaves)
    ]
    return {"checkpoint": checkpoint.name, "step": checkpoint.step, "arrays": arrays}


def plain(value: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, by strings that ``float()`` parses."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _entry(storage: Storage, manifest: Manifest) -> ListedCheckpoint:
    parameters = [
        math.prod(leaf.shape) for key, leaf in manifest.leaves.items() if is_below(key, "params")
    ]
    return ListedCheckpoint(
        step=manifest.step,
        size_bytes=manifest.size_bytes,
        written=_written(storage, manifest.step),
        arrays=len(manifest.leaves),
        parameters=sum(parameters) if parameters else None,
        metrics=manifest.metrics,
    )


def _written(storage: Storage, step: int) -> datetime | None:
    if not isinstance(storage, LocalFolder):
        return None
    try:
        seconds = (storage.path / str(step) / MANIFEST_NAME).stat().st_mtime
    except OSError:  # deleted since it was read
        return None
    return datetime.fromtimestamp(seconds, UTC).astimezone()


def _table(found: Sequence[ListedCheckpoint]) -> list[str]:
    """Return a table with the metric columns that fit, and the names of the others."""
    names = dict.fromkeys(name for entry in found for name in entry.metrics or {})
    ordered = sorted(names, key=lambda name: (name != _FIRST_METRIC, name))
    for count in range(len(ordered), -1, -1):
        lines = table(
            [_header(ordered[:count]), *(_row(e, ordered[:count]) for e in found)], left=0
        )
        if max(map(len, lines)) <= WIDTH:
            break
    if rest := ordered[count:]:
        lines += ["", shorten(f"  more metrics (--json shows them): {', '.join(rest)}", WIDTH)]
    return lines


def _header(metrics: Sequence[str]) -> list[str]:
    return ["step", "size", "written", "arrays", "parameters", *metrics]


def _row(entry: ListedCheckpoint, metrics: Sequence[str]) -> list[str]:
    values = entry.metrics or {}
    return [
        str(entry.step),
        "-" if entry.size_bytes is None else human_bytes(entry.size_bytes),
        "-" if entry.written is None else f"{entry.written:%Y-%m-%d %H:%M}",
        "-" if entry.arrays is None else str(entry.arrays),
        "-" if entry.parameters is None else human_count(entry.parameters),
        *(human_number(values[name]) if name in values else "-" for name in metrics),
    ]
