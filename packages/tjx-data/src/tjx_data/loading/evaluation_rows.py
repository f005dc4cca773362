"""Rows of an evaluation: each label of a split once.

Names of array axes: R rows, T tokens per row.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import numpy.typing as npt

from tjx_data.loading.base import IGNORED_LABEL, Batch, RowIndices
from tjx_data.loading.samplers import EpochSampler
from tjx_data.loading.token_source import TokenReader, read_chunk
from tjx_data.prepared.packing import Packing, packed_rows


def evaluation_batches(
    reader: TokenReader,
    packing: Packing | None,
    limit: int | None,
    *,
    n_labels: int,
    seq_len: int,
    batch_size: int,
    local_rows: RowIndices,
) -> Iterator[Batch]:
    """Yield the batches of `TokenLoader.evaluation_batches`.

    Parameters
    ----------
    reader : TokenReader
        The tokens of the split.
    packing : Packing or None
        Rows of packed documents; None reads windows.
    limit : int or None
        Most labels over all processes.
    n_labels : int
        Labels in the split.
    seq_len, batch_size : int
        Shape of a batch over all processes.
    local_rows : int64 [R]
        Rows of a batch that this process reads.

    Yields
    ------
    dict
        Arrays [R, T].
    """
    if packing is not None:
        n_labels = packing.n_rows * seq_len
        sampler = EpochSampler(packing.n_rows, 0)
    if limit is not None:
        n_labels = min(n_labels, limit)
    n_rows = -(-n_labels // seq_len)
    for first in range(0, n_rows, batch_size):
        reader.check_unchanged()
        numbers = first + local_rows
        if packing is None:
            yield _consecutive_windows(reader, numbers, seq_len, n_labels)
            continue
        offsets = sampler.offsets(np.minimum(numbers, n_rows - 1)).tolist()
        places = [
            (packing, offset) if number < n_rows else None
            for number, offset in zip(numbers, offsets, strict=True)
        ]
        yield packed_rows(places, seq_len, partial(read_chunk, reader))


def _consecutive_windows(
    reader: TokenReader, numbers: RowIndices, seq_len: int, n_labels: int
) -> Batch:
    """Return non-overlapping windows by number; padded beyond the first `n_labels` labels."""
    tokens = np.zeros((len(numbers), seq_len), np.int32)
    labels = np.full_like(tokens, IGNORED_LABEL)
    for row, window in enumerate(numbers.tolist()):
        start = window * seq_len
        length = min(seq_len, n_labels - start)
        if length > 0:
            chunk = read_chunk(reader, start, length)
            tokens[row, :length], labels[row, :length] = chunk
    return {"tokens": tokens, "labels": labels}


def batch_bytes(labels: npt.NDArray[np.int32], token_byte_lengths: npt.NDArray[np.int32]) -> int:
    """Count the bytes of text that the labels of a batch stand for, to compute bits per byte.

    Parameters
    ----------
    labels : int32 array
        Token ids; -100 is ignored.
    token_byte_lengths : int32 [vocab_size]
        `Tokenizer.token_byte_lengths`.

    Returns
    -------
    int
        Number of bytes of UTF-8.

    Examples
    --------
    >>> lengths = np.array([0, 1, 3], np.int32)
    >>> batch_bytes(np.array([[1, 2], [0, -100]], np.int32), lengths)
    4
    """
    return int(token_byte_lengths[labels[labels != IGNORED_LABEL]].sum(dtype=np.int64))
