"""What differs between two checkpoints: what they hold, what is said of them, and every array."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tjx_ckpt.cli.array_diff import ArrayChange, compare_leaf
from tjx_ckpt.cli.key_paths import below, in_order
from tjx_ckpt.leaf_spec import LeafSpec
from tjx_ckpt.lookup import Checkpoint
from tjx_ckpt.store.manifest import Manifest

ABSENT = object()
"""Stands for a value that one of two checkpoints does not have."""


class Note(NamedTuple):
    """Something that is said of two checkpoints and differs: ``name``, and both values."""

    name: str
    first: Any
    second: Any


class LeafPair(NamedTuple):
    """A key, and the leaf of each of two checkpoints; None where one does not have it."""

    key: str
    first: LeafSpec | None
    second: LeafSpec | None


class Difference(NamedTuple):
    """What differs between two checkpoints.

    Attributes
    ----------
    versions, metadata, metrics
        What is said of them. It does not make two states different.
    structure
        Where key, shape or dtype differ.
    arrays
        Those that both have in one shape, in the order of their keys.
    """

    versions: list[Note]
    metadata: list[Note]
    metrics: list[Note]
    structure: list[LeafPair]
    arrays: list[ArrayChange]

    @property
    def equal(self) -> bool:
        """Whether both states have the same keys, shapes, dtypes and bits."""
        return not self.structure and all(array.change.equal for array in self.arrays)


def compare_checkpoints(
    first: Checkpoint,
    second: Checkpoint,
    *,
    only: str = "",
    stacked: str = "blocks",
    progress: Callable[[int], None],
) -> Difference:
    """Compare two checkpoints, reading and checking every byte of what is compared.

    Parameters
    ----------
    first, second
        The two.
    only
        Compare what is at or below this key.
    stacked
        Part of the keys of leaves that are stacks of layers along their first axis.
    progress
        Is told how many bytes more were compared.

    Raises
    ------
    ValueError
        If neither has anything at or below ``only``.
    CorruptCheckpointError
        If a file is damaged.
    """
    pairs = _pairs(first.manifest, second.manifest, only)
    arrays = []
    for key, ours, theirs in pairs:
        if ours and theirs and ours.shape == theirs.shape:
            arrays.append(compare_leaf(first, second, key, stacked=stacked))
            progress(ours.size_bytes + theirs.size_bytes)
    return Difference(
        versions=_notes(first.manifest.versions, second.manifest.versions),
        metadata=_notes(_flat(first.manifest.metadata), _flat(second.manifest.metadata)),
        metrics=_notes(first.manifest.metrics, second.manifest.metrics),
        structure=[pair for pair in pairs if pair.first != pair.second],
        arrays=arrays,
    )


def bytes_to_compare(first: Checkpoint, second: Checkpoint, only: str) -> int:
    """Return how many bytes `compare_checkpoints` tells its ``progress`` at most."""
    pairs = _pairs(first.manifest, second.manifest, only)
    return sum(leaf.size_bytes for pair in pairs for leaf in (pair.first, pair.second) if leaf)


def _pairs(first: Manifest, second: Manifest, only: str) -> list[LeafPair]:
    keys = below(first.leaves.keys() | second.leaves.keys(), only)
    return [LeafPair(key, first.leaves.get(key), second.leaves.get(key)) for key in keys]


def _notes(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Note]:
    notes = [
        Note(name, first.get(name, ABSENT), second.get(name, ABSENT))
        for name in in_order(first.keys() | second.keys())
    ]
    # By their text: NaN is not equal to itself.
    return [note for note in notes if repr(note.first) != repr(note.second)]


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Return nested metadata under names such as ``config.train.max_steps``."""
    if not isinstance(value, dict) or not value:
        return {name: value} if name else {}
    found = {}
    for key, inner in value.items():
        found.update(_flat(inner, f"{name}.{key}" if name else key))
    return found
