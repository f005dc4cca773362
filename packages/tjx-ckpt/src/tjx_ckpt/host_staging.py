"""Which pieces of a state this process writes, brought into host memory."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tjx_ckpt.store.tensor_file import Piece


class StagedPiece(NamedTuple):
    """A piece of a leaf in host memory, and the name that it gets in its file."""

    name: str
    piece: Piece
    array: np.ndarray


def stage(leaves: Mapping[str, Any]) -> list[StagedPiece]:
    """Bring this process's pieces into host memory; returns when buffers may be donated.

    Every piece of an array belongs to one process: that with its first replica. What lies in the
    memory of a CPU device is not copied: JAX does not give it away while somebody looks at it.

    Parameters
    ----------
    leaves
        Arrays by key: jax.Arrays or NumPy arrays. Those without elements have nothing to stage.
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
    """Divide pieces by the first part of their keys ("params", "opt_state"): a file for each.

    So parameters can be read, copied and opened by other programs without the rest.
    """
    groups: dict[str, list[StagedPiece]] = {}
    for staged in pieces:
        first, separator, _ = staged.piece.key.partition("/")
        group = re.sub(r"[^A-Za-z0-9_]", "_", first) if separator else "state"
        groups.setdefault(group, []).append(staged)
    return groups


def _pieces(leaf: Any) -> list[tuple[tuple[int, ...], Any]]:
    if not isinstance(leaf, jax.Array):
        # The caller may change it in place as soon as we return.
        return [((0,) * leaf.ndim, np.array(leaf))] if jax.process_index() == 0 else []
    if leaf.is_fully_addressable and jax.process_index() != 0:
        return []  # each process has the same
    return [
        (_start(shard.index, leaf.shape), shard.data)
        for shard in leaf.addressable_shards
        if shard.replica_id == 0
    ]


def _start(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(part.indices(length)[0] for part, length in zip(index, shape, strict=True))
