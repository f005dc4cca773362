"""Differences between two checkpoints: structure, metadata and every array."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tjx_ckpt.cli.array_diff import ArrayChange, compare_leaf
from tjx_ckpt.cli.key_paths import below, in_order
from tjx_ckpt.leaf_spec import LeafSpec
from tjx_ckpt.lookup import Checkpoint
from tjx_ckpt.store.manifest import Manifest

ABSENT = object()
"""Placeholder for a value that one of the two checkpoints lacks."""


class MetadataDiff(NamedTuple):
    """Name and values of an item of metadata that differs."""

    name: str
    first: Any
    second: Any


class LeafPair(NamedTuple):
    """Key and leaves of both checkpoints; None for a missing leaf."""

    key: str
    first: LeafSpec | None
    second: LeafSpec | None


class CheckpointDiff(NamedTuple):
    """Differences between two checkpoints.

    Attributes
    ----------
    versions, metadata, metrics
        Differences that do not affect `equal`.
    structure
        Leaves whose key, shape or dtype differ.
    arrays
        Differences of arrays with the same key and shape, in the order of the keys.
    """

    versions: list[MetadataDiff]
    metadata: list[MetadataDiff]
    metrics: list[MetadataDiff]
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
) -> CheckpointDiff:
    """Compare two checkpoints, verifying every byte that is read.

    Parameters
    ----------
    first, second
        The checkpoints.
    only
        Compare leaves at or below this key.
    stacked
        Key part of leaves that stack layers along their first axis.
    progress
        Called with the number of bytes compared since the last call.

    Raises
    ------
    ValueError
        If neither has a leaf at or below ``only``.
    CorruptCheckpointError
        If a file is damaged.
    """
    pairs = _pairs(first.manifest, second.manifest, only)
    arrays = []
    for key, ours, theirs in pairs:
        if ours and theirs and ours.shape == theirs.shape:
            arrays.append(compare_leaf(first, second, key, stacked=stacked))
            progress(ours.size_bytes + theirs.size_bytes)
    return CheckpointDiff(
        versions=_metadata_diffs(first.manifest.versions, second.manifest.versions),
        metadata=_metadata_diffs(_flat(first.manifest.metadata), _flat(second.manifest.metadata)),
        metrics=_metadata_diffs(first.manifest.metrics, second.manifest.metrics),
        structure=[pair for pair in pairs if pair.first != pair.second],
        arrays=arrays,
    )


def bytes_to_compare(first: Checkpoint, second: Checkpoint, only: str) -> int:
    """Return the maximum number of bytes that `compare_checkpoints` reports as progress."""
    pairs = _pairs(first.manifest, second.manifest, only)
    return sum(leaf.size_bytes for pair in pairs for leaf in (pair.first, pair.second) if leaf)


def _pairs(first: Manifest, second: Manifest, only: str) -> list[LeafPair]:
    keys = below(first.leaves.keys() | second.leaves.keys(), only)
    return [LeafPair(key, first.leaves.get(key), second.leaves.get(key)) for key in keys]


def _metadata_diffs(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[MetadataDiff]:
    diffs = [
        MetadataDiff(name, first.get(name, ABSENT), second.get(name, ABSENT))
        for name in in_order(first.keys() | second.keys())
    ]
    # Compared as text, since NaN is not equal to itself.
    return [diff for diff in diffs if repr(diff.first) != repr(diff.second)]


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Flatten nested metadata to names such as ``config.train.max_steps``."""
    if not isinstance(value, dict) or not value:
        return {name: value} if name else {}
    found = {}
    for key, inner in value.items():
        found.update(_flat(inner, f"{name}.{key}" if name else key))
    return found
