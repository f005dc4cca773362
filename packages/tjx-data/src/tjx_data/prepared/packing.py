"""Whole documents in rows: which of them share a row, decided once for a prepared set.

Best fit, longest first: each document goes to the row that has the least room left which is enough
(Krell et al. 2021, "Efficient sequence packing without cross-contamination"; Ding et al. 2024,
"Fewer truncations improve language modeling"). A document longer than a row fills rows of its own,
and what is left of it is packed like a document.
"""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tjx_data.atomic import write_atomically
from tjx_data.corpora.documents import SplitName
from tjx_data.prepared.document_starts import read_starts
from tjx_data.prepared.index import Index, check_hash, read_index
from tjx_data.prepared.npz import read_arrays

Places = npt.NDArray[np.int64]


class Packing(NamedTuple):
    """Which stretches of a split's stream share a row.

    Attributes
    ----------
    rows : int64 [rows + 1]
        Row r holds the stretches rows[r] to rows[r + 1] - 1.
    starts : int64 [stretches]
        Position in the stream of a stretch's first token; its labels are the tokens after each.
    lengths : int64 [stretches]
        Tokens of a stretch.
    """

    rows: Places
    starts: Places
    lengths: Places

    @property
    def n_rows(self) -> int:
        """Rows of an epoch."""
        return len(self.rows) - 1


def packing_file(directory: Path, split: SplitName, seq_len: int) -> Path:
    """Return where the packing of a split lies."""
    return directory / f"packing_{split}_{seq_len}.npz"


def open_packing(directory: str | Path, split: SplitName, seq_len: int) -> Packing:
    """Read how a split is packed into rows of `seq_len` tokens, or decide it and keep that.

    Parameters
    ----------
    directory : str or Path
        A prepared set.
    split : {"train", "validation"}
        Which part of it.
    seq_len : int
        Tokens in a row.

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
    packing = pack(*_stretches(directory, index, split), seq_len)
    content = io.BytesIO()
    of = np.frombuffer(entry.sha256.encode(), np.uint8)
    np.savez(content, allow_pickle=False, of=of, **packing._asdict())
    write_atomically(file, content.getvalue())
    return packing


def _read(file: Path, of: str, n_tokens: int, seq_len: int) -> Packing | None:
    """Read a packing; None if it is that of other documents."""
    arrays = read_arrays(file)
    try:
        if arrays["of"].tobytes().decode(errors="replace") != of:
            return None
        found = Packing(arrays["rows"], arrays["starts"], arrays["lengths"])
        _check(found, n_tokens, seq_len)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file}: damaged ({error}); remove it, and it is made again") from error
    return found


def _check(packing: Packing, n_tokens: int, seq_len: int) -> None:
    """Refuse a packing that no set of so many tokens has, before a row is read by it."""
    rows, starts, lengths = packing
    if any(array.dtype != np.int64 or array.ndim != 1 for array in packing):
        raise ValueError("its arrays are not rows of int64")
    if len(starts) != len(lengths) or rows[:1].tolist() != [0] or rows[-1] != len(starts):
        raise ValueError("its arrays do not fit each other")
    inside = (starts >= 0) & (lengths > 0) & (lengths <= seq_len) & (starts < n_tokens - lengths)
    if (np.diff(rows) < 0).any() or not inside.all():
        raise ValueError(f"it names tokens beyond the {n_tokens} of the split, or of a row")
    filled = np.diff(np.append(0, np.cumsum(lengths))[rows])
    if filled.size and filled.max() > seq_len:
        raise ValueError(f"a row holds {filled.max()} tokens, of {seq_len}")


def _stretches(directory: Path, index: Index, split: SplitName) -> tuple[Places, Places]:
    """Return where each document's first token stands, and how many labels follow from there.

    With an end-of-text token a document begins with the one before it and its last label is the
    one after it; without, its first token has no label and its last none after it.
    """
    starts = read_starts(directory, index, split)
    ends = np.append(starts[1:], index.splits[split].n_tokens)
    if index.eot_id is None:
        return starts, ends - starts - 1
    return starts - 1, ends - starts


def pack(starts: Places, lengths: Places, seq_len: int) -> Packing:
    """Pack stretches of a stream into rows.

    Parameters
    ----------
    starts, lengths : int64 [documents]
        Where each begins, and how many tokens with a label it has.
    seq_len : int
        Tokens in a row.

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
    rooms = 0  # bit r is set where open_rows[r] holds a row
    n_rows = 0
    for stretch, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms &= ~(1 << room)
        else:
            room, row = seq_len, n_rows
            n_rows += 1
        row_of[stretch] = row
        if left := room - length:
            open_rows[left].append(row)
            rooms |= 1 << left
    by_row = order[np.argsort(row_of[order], kind="stable")]
    rows = np.searchsorted(row_of[by_row], np.arange(n_rows + 1))
    return Packing(rows.astype(np.int64), starts[by_row], lengths[by_row])


def _cut(starts: Places, lengths: Places, seq_len: int) -> tuple[Places, Places]:
    """Cut stretches longer than a row; those without a label are left out."""
    n_pieces = -(-lengths // seq_len)
    of = np.repeat(np.arange(len(lengths)), n_pieces)
    first = np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)
    offsets = (np.arange(len(of)) - first) * seq_len
    return starts[of] + offsets, np.minimum(lengths[of] - offsets, seq_len)
