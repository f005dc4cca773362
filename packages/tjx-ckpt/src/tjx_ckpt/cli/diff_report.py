"""Subcommand ``diff``: differences of two checkpoints as text and as JSON."""

import json
import math
from collections.abc import Sequence
from typing import Any

from tjx_ckpt.cli.array_diff import ArrayChange, Change, merge_changes
from tjx_ckpt.cli.checkpoint_diff import ABSENT, CheckpointDiff, LeafPair, MetadataDiff
from tjx_ckpt.cli.listing import plain
from tjx_ckpt.cli.terminal import WIDTH, human_number, shape_text, shorten, table
from tjx_ckpt.leaf_spec import LeafSpec
from tjx_ckpt.lookup import Checkpoint

_COLUMNS = ("norm A", "norm B", "change", "largest")


def difference_text(
    first: Checkpoint,
    second: Checkpoint,
    difference: CheckpointDiff,
    *,
    top: int | None = None,
    by_layer: bool = False,
) -> str:
    """Return the differences as text.

    Parameters
    ----------
    first, second
        The compared checkpoints.
    difference
        Their differences.
    top
        Show this many arrays with the largest relative changes, largest first.
    by_layer
        Show each layer of stacked arrays instead of the whole array.
    """
    lines = [f"A  {first.name}", f"B  {second.name}"]
    for title, notes in (
        ("versions", difference.versions),
        ("metadata", difference.metadata),
        ("metrics", difference.metrics),
    ):
        if notes:
            lines += ["", f"{title} that differ", *map(_metadata_line, notes)]
    if difference.structure:
        lines += [
            "",
            "arrays with different shapes or dtypes",
            *map(_structure_line, difference.structure),
        ]
    if difference.arrays:
        lines += ["", *_array_lines(difference.arrays, top=top, by_layer=by_layer)]
        lines += _layer_lines(difference.arrays)
    return "\n".join([*lines, "", _summary(difference)])


def difference_json(
    first: Checkpoint, second: Checkpoint, difference: CheckpointDiff, *, top: int | None = None
) -> dict[str, Any]:
    """Return the differences as plain JSON, always with layers."""
    arrays = difference.arrays if top is None else _largest(difference.arrays, top)
    return {
        "a": first.name,
        "b": second.name,
        "equal": difference.equal,
        "versions": [_metadata_json(note) for note in difference.versions],
        "metadata": [_metadata_json(note) for note in difference.metadata],
        "metrics": [_metadata_json(note) for note in difference.metrics],
        "structure": [
            {"key": pair.key, "a": _leaf_json(pair.first), "b": _leaf_json(pair.second)}
            for pair in difference.structure
        ],
        "arrays": [
            {
                "key": array.key,
                **_change_json(array.change),
                "layers": [_change_json(layer) for layer in array.layers],
            }
            for array in arrays
        ],
        "all": _change_json(merge_changes([array.change for array in difference.arrays])),
    }


def _array_lines(arrays: Sequence[ArrayChange], *, top: int | None, by_layer: bool) -> list[str]:
    if by_layer:
        arrays = [part for array in arrays for part in _layers_of(array)]
    shown = arrays if top is None else _largest(arrays, top)
    rows = [("array", *_COLUMNS), *((array.key, *_cells(array.change)) for array in shown)]
    lines = table(rows)
    if hidden := len(arrays) - len(shown):
        lines.append(f"  and {hidden} with smaller changes")
    return lines


def _layer_lines(arrays: Sequence[ArrayChange]) -> list[str]:
    """Return a table for each stack with a row per layer over all its arrays."""
    lines: list[str] = []
    for stack in dict.fromkeys(array.stack for array in arrays if array.stack):
        members = [array for array in arrays if array.stack == stack]
        depth = max(len(array.layers) for array in members)
        rows = [(f"{stack}, layer", *_COLUMNS)]
        for layer in range(depth):
            here = [array.layers[layer] for array in members if layer < len(array.layers)]
            rows.append((str(layer), *_cells(merge_changes(here))))
        lines += ["", *table(rows)]
    return lines


def _layers_of(array: ArrayChange) -> list[ArrayChange]:
    return [
        ArrayChange(f"{array.key}[{index}]", layer, None, ())
        for index, layer in enumerate(array.layers)
    ] or [array]


def _largest(arrays: Sequence[ArrayChange], count: int) -> list[ArrayChange]:
    """Return the arrays with the largest relative changes, NaN first."""

    def rank(array: ArrayChange) -> tuple[bool, float, bool]:
        relative = array.change.relative
        unknown = math.isnan(relative)
        return (not unknown, 0.0 if unknown else -relative, array.change.equal)

    return sorted(arrays, key=rank)[:count]


def _cells(change: Change) -> tuple[str, str, str, str]:
    if change.equal:
        return human_number(change.norm), human_number(change.other_norm), "equal", ""
    return (
        human_number(change.norm),
        human_number(change.other_norm),
        human_number(change.relative),
        human_number(change.largest),
    )


def _summary(difference: CheckpointDiff) -> str:
    arrays = difference.arrays
    equal = sum(array.change.equal for array in arrays)
    if difference.equal:
        return f"equal: all {len(arrays)} arrays, bit for bit"
    parts = [f"{equal} of {len(arrays)} arrays are equal bit for bit"]
    if arrays:
        change = merge_changes([array.change for array in arrays])
        parts.append(f"the total change is {human_number(change.relative)}")
    if difference.structure:
        parts.append(f"{len(difference.structure)} incompatible")
    return f"different: {'; '.join(parts)}"


def _metadata_line(note: MetadataDiff) -> str:
    def text(value: Any) -> str:
        return "absent" if value is ABSENT else json.dumps(value)

    half = (WIDTH - len(note.name) - 10) // 2
    first, second = (shorten(text(value), max(half, 12)) for value in (note.first, note.second))
    return shorten(f"  {note.name}: A {first}, B {second}", WIDTH)


def _structure_line(pair: LeafPair) -> str:
    def text(leaf: LeafSpec | None) -> str:
        return f"{leaf.dtype} {shape_text(leaf.shape)}" if leaf else "absent"

    ends = f": A {text(pair.first)}, B {text(pair.second)}"
    return f"  {shorten(pair.key, max(WIDTH - 2 - len(ends), 12))}{ends}"


def _metadata_json(note: MetadataDiff) -> dict[str, Any]:
    values = {"a": note.first, "b": note.second}
    present = {side: plain(value) for side, value in values.items() if value is not ABSENT}
    return {"name": note.name, **present}


def _leaf_json(leaf: LeafSpec | None) -> dict[str, Any] | None:
    return {"shape": list(leaf.shape), "dtype": leaf.dtype} if leaf else None


def _change_json(change: Change) -> dict[str, Any]:
    return {
        "norm_a": plain(change.norm),
        "norm_b": plain(change.other_norm),
        "relative_change": plain(change.relative),
        "largest_change": plain(change.largest),
        "equal": change.equal,
    }
