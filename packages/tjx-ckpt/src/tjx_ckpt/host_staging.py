"""Copies of this process's pieces of a state in host memory."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tjx_ckpt.store.tensor_file import Piece


class StagedPiece(NamedTuple):
    """A piece of a leaf in host memory, with its name in the file."""

    name: str
    piece: Piece
    array: np.ndarray


def stage(leaves: Mapping[str, Any]) -> list[StagedPiece]:
    """Copy this process's pieces to host memory; afterwards the buffers may be donated.

    Each piece of an array belongs to the process with its first replica. Buffers of CPU devices
    are not copied: JAX does not reuse them while a reference exists.

    Parameters
    ----------
    leaves : mapping of str to array
        jax.Arrays or NumPy arrays by key. Empty arrays have no pieces.

    Returns
    -------
    list of StagedPiece
        In the order of the leaves.
    """
    places: list[Piece] = []
    data: list[Any] = []
    for key, leaf in leaves.items():
        if leaf.size:
            for start, part in _pieces(leaf):
                places.append(Piece(key, start, tuple(part.shape)))
                data.append(part)
    arrays = jax.device_get(data)  # all transfers at once
    return [
        StagedPiece(piece.name(tuple(leaves[piece.key].shape)), piece, np.asarray(array))
        for piece, array in zip(places, arrays, strict=True)
    ]


def by_group(pieces: Sequence[StagedPiece]) -> dict[str, list[StagedPiece]]:
    """Group pieces by the first part of their keys ("params", "opt_state"), one file for each.

    Other programs can then read the parameters without the optimizer state.
    """
    groups: dict[str, list[StagedPiece]] = {}
    for staged in pieces:
        first, separator, _ = staged.piece.key.partition("/")
        group = re.sub(r"[^A-Za-z0-9_]", "_", first) if separator else "state"
        groups.setdefault(group, []).append(staged)
    return groups


def _pieces(leaf: Any) -> list[tuple[tuple[int, ...], Any]]:
    if not isinstance(leaf, jax.Array):
        # Copied, since the caller may change it in place after `stage` returns.
        return [((0,) * leaf.ndim, np.array(leaf))] if jax.process_index() == 0 else []
    if leaf.is_fully_addressable and jax.process_index() != 0:
        return []  # process 0 writes the same content
    return [
        (_start(shard.index, leaf.shape), shard.data)
        for shard in leaf.addressable_shards
        if shard.replica_id == 0
    ]


def _start(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(part.indices(length)[0] for part, length in zip(index, shape, strict=True))
