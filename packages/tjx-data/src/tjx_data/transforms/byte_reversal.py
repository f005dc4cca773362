"""Byte reversal: a synthetic task for sequence-to-sequence models.

Names of array axes: R rows, S bytes of a string, T = S + 1 tokens of its reversal and the end.
"""

from collections.abc import Iterator, Mapping
from typing import Literal, Unpack

import numpy as np
import numpy.typing as npt

from tjx_data.loading.base import IGNORED_LABEL, Batch, Batching, Loader, RowIndices
from tjx_data.loading.samplers import derive_key, random_words

PADDING, START, END = 0, 1, 2
FIRST_BYTE = 3
"""Token of byte 0; byte b is token FIRST_BYTE + b."""
VOCAB_SIZE = FIRST_BYTE + 256
_PURPOSE = int.from_bytes(b"reversal")
_SPLITS = {"train": 0, "validation": 1}


class ReversalLoader(Loader):
    """Random byte strings and their reversals, generated on access.

    Parameters
    ----------
    max_length : int
        Bytes of the longest string; lengths are uniform over 1 to this.
    split : {"train", "validation"}
        Selects one of two independent random streams; validation has `validation_strings` strings.
    **batching
        batch_size, seed, process_index and process_count, as of `Loader`.

    Raises
    ------
    ValueError
        With one line for each invalid argument.
    """

    validation_strings = 1000

    def __init__(
        self,
        *,
        max_length: int,
        split: Literal["train", "validation"] = "train",
        **batching: Unpack[Batching],
    ) -> None:
        problems = []
        if max_length < 1:
            problems.append(f"max_length: got {max_length}; expected at least 1 byte")
        if split not in _SPLITS:
            problems.append(f"split: got {split!r}; expected train or validation")
        super().__init__(problems=problems, **batching)
        self.max_length, self.split = max_length, split
        self._key = derive_key(self.seed, _PURPOSE, _SPLITS[split])

    @property
    def identity(self) -> Mapping[str, str]:
        """Everything that determines the strings, by name."""
        return {
            "strings": "random bytes and their reversals",
            "max_length": str(self.max_length),
            "split": self.split,
            "seed": str(self.seed),
        }

    def rows(self, row_indices: RowIndices) -> Batch:
        """Return strings and their reversals by row index.

        Returns
        -------
        dict
            ``source`` int32 [R, S], a string and padding; ``source_mask`` bool [R, S], False at
            padding; ``tokens`` int32 [R, T], the start token and the reversed string; ``labels``
            int32 [R, T], the token after each: the reversed string, the end, then -100.
        """
        words = random_words(self._key, row_indices, self.max_length + 1)
        lengths = (words[:, :1] % np.uint64(self.max_length)).astype(np.int64) + 1
        column = np.arange(self.max_length)[None, :]
        inside = column < lengths
        source = (words[:, 1:] >> np.uint64(56)).astype(np.int32) + FIRST_BYTE
        source[~inside] = PADDING
        backwards = np.take_along_axis(source, np.maximum(lengths - 1 - column, 0), 1)
        tokens = np.full((len(row_indices), self.max_length + 1), PADDING, np.int32)
        tokens[:, 0] = START
        tokens[:, 1:][inside] = backwards[inside]
        labels = np.full_like(tokens, IGNORED_LABEL)
        labels[:, :-1][inside] = backwards[inside]
        np.put_along_axis(labels, lengths, END, 1)
        return {"source": source, "source_mask": inside, "tokens": tokens, "labels": labels}

    def evaluation_batches(self, limit: int | None = None) -> Iterator[Batch]:
        """Yield the strings of the split in batches of one shape; labels beyond them are -100.

        Parameters
        ----------
        limit : int, optional
            Most strings to yield over all processes.
        """
        count = self.validation_strings
        count = count if limit is None else min(limit, count)
        for first in range(0, count, self.batch_size):
            batch = self.rows(first + self._local_rows)
            batch["labels"][first + self._local_rows >= count] = IGNORED_LABEL
            yield batch


def decode(row: npt.NDArray[np.int32]) -> bytes:
    """Return the bytes of a token row up to its end token, without special tokens.

    Parameters
    ----------
    row : int32 [T]
        Tokens or labels of one row.

    Examples
    --------
    >>> decode(np.array([START, FIRST_BYTE + 104, FIRST_BYTE + 105, END, FIRST_BYTE + 106]))
    b'hi'
    """
    tokens = row.tolist()
    tokens = tokens[: tokens.index(END)] if END in tokens else tokens
    return bytes(token - FIRST_BYTE for token in tokens if token >= FIRST_BYTE)
