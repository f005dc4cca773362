"""Sequence packing: whole documents in rows of fixed length, decided once per prepared set.

Best-fit decreasing: each document, longest first, goes to the row with the least sufficient room
(Krell et al. 2021, "Efficient sequence packing without cross-contamination"; Ding et al. 2024,
"Fewer truncations improve language modeling"). A document longer than a row is cut into full rows
and a rest, which is packed like a document.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tjx_data.corpora.documents import SplitName
from tjx_data.loading.base import IGNORED_LABEL, Batch
from tjx_data.prepared.index import Index, read_index
from tjx_data.prepared.integrity import check_hash, read_starts
from tjx_data.prepared.npz import read_arrays, write_arrays

IntArray = npt.NDArray[np.int64]


class Packing(NamedTuple):
    """Assignment of chunks of a split's stream to rows.

    Attributes
    ----------
    rows : int64 [rows + 1]
        Row r holds the chunks rows[r] to rows[r + 1] - 1.
    starts : int64 [chunks]
        Position in the stream of a chunk's first token; its labels are the tokens after each.
    lengths : int64 [chunks]
        Tokens of a chunk.
    """

    rows: IntArray
    starts: IntArray
    lengths: IntArray

    @property
    def n_rows(self) -> int:
        """Number of rows per epoch."""
        return len(self.rows) - 1


def packed_rows(
    places: Sequence[tuple[Packing, int] | None],
    seq_len: int,
    read: Callable[[int, int], tuple[npt.NDArray[Any], npt.NDArray[Any]]],
) -> Batch:
    """Return rows of packed chunks, each chunk a segment with its own positions.

    Parameters
    ----------
    places : sequence of (Packing, int) or None, one per row
        Packing of a row and the row's number in it; None is a row of padding.
    seq_len : int
        Tokens per row.
    read : callable
        From the start and length of a chunk to its tokens and labels, [length] each.

    Returns
    -------
    dict
        ``tokens``, ``labels``, ``segment_ids`` (from 1) and ``positions``, int32 [rows, seq_len];
        padding has token 0, label -100 and segment 0.
    """
    shape = (len(places), seq_len)
    tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    labels = np.full(shape, IGNORED_LABEL, np.int32)
    for row, place in enumerate(places):
        if place is None:
            continue
        packing, number = place
        column = 0
        chunks = range(packing.rows[number], packing.rows[number + 1])
        for segment, chunk in enumerate(chunks, start=1):
            length = int(packing.lengths[chunk])
            columns = slice(column, column + length)
            found = read(int(packing.starts[chunk]), length)
            tokens[row, columns], labels[row, columns] = found
            segments[row, columns] = segment
            positions[row, columns] = np.arange(length)
            column += length
    return {"tokens": tokens, "labels": labels, "segment_ids": segments, "positions": positions}


def packing_file(directory: Path, split: SplitName, seq_len: int) -> Path:
    """Return the file of the packing of a split into rows of `seq_len` tokens."""
    return directory / f"packing_{split}_{seq_len}.npz"


def open_packing(directory: str | Path, split: SplitName, seq_len: int) -> Packing:
    """Read the packing of a split, or compute and store it.

    Parameters
    ----------
    directory : str or Path
        A prepared set.
    split : {"train", "validation"}
        Split to pack.
    seq_len : int
        Tokens per row.

    Raises
    ------
    ValueError
        If the set is damaged.
    """
    directory = Path(directory)
    index = read_index(directory)
    file = packing_file(directory, split, seq_len)
    entry = index.splits[split].starts
    if file.exists():
        found = _read(file, entry.sha256, index.splits[split].n_tokens, seq_len)
        if found is not None:
            return found
    check_hash(directory, entry)
    packing = pack(*_document_chunks(directory, index, split), seq_len)
    documents = np.frombuffer(entry.sha256.encode(), np.uint8)
    write_arrays(file, {"of": documents, **packing._asdict()})
    return packing


def _read(file: Path, documents_sha256: str, n_tokens: int, seq_len: int) -> Packing | None:
    """Read a packing, or return None if it is of other documents."""
    arrays = read_arrays(file)
    try:
        if arrays["of"].tobytes().decode(errors="replace") != documents_sha256:
            return None
        found = Packing(arrays["rows"], arrays["starts"], arrays["lengths"])
        _check(found, n_tokens, seq_len)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{file}: damaged ({error}); delete it, and it is created again"
        ) from error
    return found


def _check(packing: Packing, n_tokens: int, seq_len: int) -> None:
    """Check that a packing fits the stream and the row length, before rows are read by it."""
    rows, starts, lengths = packing
    if any(array.dtype != np.int64 or array.ndim != 1 for array in packing):
        raise ValueError("expected vectors of int64")
    if len(starts) != len(lengths) or rows[:1].tolist() != [0] or rows[-1] != len(starts):
        raise ValueError("the lengths of its arrays contradict each other")
    inside = (starts >= 0) & (lengths > 0) & (lengths <= seq_len) & (starts < n_tokens - lengths)
    if (np.diff(rows) < 0).any() or not inside.all():
        raise ValueError(f"got chunks beyond the {n_tokens} tokens of the split, or of a row")
    filled = np.diff(np.append(0, np.cumsum(lengths))[rows])
    if filled.size and filled.max() > seq_len:
        raise ValueError(f"got a row of {filled.max()} tokens; expected at most {seq_len}")


def _document_chunks(directory: Path, index: Index, split: SplitName) -> tuple[IntArray, IntArray]:
    """Return start and number of labels of each document, int64 [documents].

    With an end-of-text token a document starts at the one before it and its last label is the one
    after it. Without, its first token is no label and its last token has none.
    """
    starts = read_starts(directory, index, split)
    ends = np.append(starts[1:], index.splits[split].n_tokens)
    if index.eot_id is None:
        return starts, ends - starts - 1
    return starts - 1, ends - starts


def pack(starts: IntArray, lengths: IntArray, seq_len: int) -> Packing:
    """Pack chunks of a stream into rows by best-fit decreasing.

    Parameters
    ----------
    starts, lengths : int64 [documents]
        Start of each document in the stream, and its number of tokens with a label.
    seq_len : int
        Tokens per row.

    Examples
    --------
    >>> packing = pack(np.array([0, 3, 8]), np.array([2, 5, 3]), 5)
    >>> packing.n_rows, packing.starts.tolist(), packing.lengths.tolist()
    (2, [3, 8, 0], [5, 3, 2])
    """
    starts, lengths = _cut(starts, lengths, seq_len)
    order = np.argsort(-lengths, kind="stable")
    row_of = np.empty(len(order), np.int64)
    open_rows: list[list[int]] = [[] for _ in range(seq_len + 1)]  # by room left
    rooms = 0  # bit r is set if open_rows[r] holds a row
    n_rows = 0
    for chunk, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms &= ~(1 << room)
        else:
            room, row = seq_len, n_rows
            n_rows += 1
        row_of[chunk] = row
        if left := room - length:
            open_rows[left].append(row)
            rooms |= 1 << left
    by_row = order[np.argsort(row_of[order], kind="stable")]
    rows = np.searchsorted(row_of[by_row], np.arange(n_rows + 1))
    return Packing(rows.astype(np.int64), starts[by_row], lengths[by_row])


def _cut(starts: IntArray, lengths: IntArray, seq_len: int) -> tuple[IntArray, IntArray]:
    """Cut chunks longer than a row, and drop those without a label."""
    n_chunks = -(-lengths // seq_len)
    document = np.repeat(np.arange(len(lengths)), n_chunks)
    first = np.repeat(np.cumsum(n_chunks) - n_chunks, n_chunks)
    offsets = (np.arange(len(document)) - first) * seq_len
    return starts[document] + offsets, np.minimum(lengths[document] - offsets, seq_len)
