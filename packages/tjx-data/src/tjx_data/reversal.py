"""A task to try a sequence-to-sequence model on: strings of bytes, to be written backwards.

Names of array axes: B strings, S bytes of a string, T its reversal and its end.
"""

import hashlib
from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

from tjx_data.loader import IGNORED_LABEL, Batch, check_numbers

PADDING, START, END = 0, 1, 2
FIRST_BYTE = 3  # byte 0 is token 3, and so on
VOCAB_SIZE = FIRST_BYTE + 256
_SPLITS = {"train": 0, "validation": 1}


class ReversalLoader:
    """Batches of random strings and their reversals, made up when they are asked for.

    Parameters
    ----------
    max_length : int
        Bytes of the longest string; lengths are drawn from 1 to this.
    split : {"train", "validation"}
        Two streams that have nothing to do with each other; validation has `validation_strings`.
    batch_size : int
        Strings in a batch over all processes.
    seed : int
        Decides the strings, with the step; 0 to 2**64 - 1.
    process_index, process_count : int
        This process has the rows process_index, process_index + process_count, ... of each batch.
    """

    validation_strings = 1000

    def __init__(
        self,
        *,
        max_length: int,
        split: Literal["train", "validation"] = "train",
        batch_size: int,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ):
        check_numbers(batch_size, seed, process_index, process_count)
        if max_length < 1:
            raise ValueError(f"max_length={max_length}: a string has at least 1 byte")
        self.max_length, self.split = max_length, split
        self.batch_size, self.seed = batch_size, seed
        self._rows = np.arange(process_index, batch_size, process_count)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides what ``batch(step)`` is."""
        text = f"reversal {self.max_length} {self.split} {self.batch_size} {self.seed}"
        return hashlib.sha256(text.encode()).hexdigest()

    def batch(self, step: int) -> Batch:
        """Return this process's rows of the batch of a step.

        Returns
        -------
        dict
            int32 arrays [batch_size / process_count, ...]: ``source`` [S], a string and padding;
            ``tokens`` [T = S + 1], the start and the string backwards; ``labels`` [T], the token
            after each: the string backwards and the end, then -100.
        """
        key = np.array([self.seed, 2 * step + _SPLITS[self.split]], np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key))
        lengths = generator.integers(1, self.max_length + 1, self.batch_size)[self._rows]
        shape = (self.batch_size, self.max_length)
        bytes_ = generator.integers(0, 256, shape)[self._rows]
        source = (bytes_ + FIRST_BYTE).astype(np.int32)
        place = np.arange(self.max_length)[None, :]
        source[place >= lengths[:, None]] = PADDING
        backwards = np.take_along_axis(source, np.maximum(lengths[:, None] - 1 - place, 0), 1)
        inside = place < lengths[:, None]
        tokens = np.full((len(source), self.max_length + 1), PADDING, np.int32)
        tokens[:, 0] = START
        tokens[:, 1:][inside] = backwards[inside]
        labels = np.full_like(tokens, IGNORED_LABEL)
        labels[:, :-1][inside] = backwards[inside]
        labels[np.arange(len(source)), lengths] = END
        return {"source": source, "tokens": tokens, "labels": labels}

    def evaluation_batches(self, max_strings: int | None = None) -> Iterator[Batch]:
        """Yield the strings of the split, in batches of one shape; labels beyond them are -100."""
        count = self.validation_strings
        count = count if max_strings is None else min(max_strings, count)
        for first in range(0, count, self.batch_size):
            batch = self.batch(first // self.batch_size)
            batch["labels"][first + self._rows >= count] = IGNORED_LABEL
            yield batch


def decode(row: npt.NDArray[np.int32]) -> bytes:
    """Return the bytes of a row up to its end, without the other tokens.

    Examples
    --------
    >>> decode(np.array([START, FIRST_BYTE + 104, FIRST_BYTE + 105, END, FIRST_BYTE + 106]))
    b'hi'
    """
    tokens = row.tolist()
    tokens = tokens[: tokens.index(END)] if END in tokens else tokens
    return bytes(token - FIRST_BYTE for token in tokens if token >= FIRST_BYTE)
