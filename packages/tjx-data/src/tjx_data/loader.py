"""Reading a prepared set: batches that are a pure function of (seed, step).

Names of array axes: B rows, T tokens in a row.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tjx_data.documents import SplitName
from tjx_data.epochs import EpochOrder
from tjx_data.index import check_hash, check_size, read_index
from tjx_data.tokenizer import Tokenizer

IGNORED_LABEL = -100

Batch = dict[str, npt.NDArray[np.int32]]


class TokenLoader:
    """Batches of token windows from a prepared set.

    The stream of a split is cut into windows of `seq_len` tokens, each with its next tokens as
    labels, so that every token is a label in one window. Each epoch visits the windows in an order
    of its own, drawn from (seed, epoch), and batches go on from one epoch into the next without a
    gap. The (n_tokens - 1) mod seq_len labels that fill no window are others in each epoch. There
    is no state: ``batch(step)`` depends on the arguments alone.

    Parameters
    ----------
    directory : str or Path
        A prepared set.
    split : {"train", "validation"}
        Which part of it.
    seq_len : int
        Tokens in a row.
    batch_size : int
        Rows in a batch over all processes.
    seed : int
        Decides the order, with the epoch; 0 to 2**64 - 1.
    process_index, process_count : int
        This process reads the rows process_index, process_index + process_count, ... of each
        batch.
    tokenizer : Tokenizer, optional
        The tokenizer that the caller will use; another than the set's is refused.

    Raises
    ------
    ValueError
        If the set is damaged or made with another tokenizer, or is too short for a window, or a
        number is out of range.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        split: SplitName = "train",
        seq_len: int,
        batch_size: int,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        tokenizer: Tokenizer | None = None,
    ):
        self.directory = Path(directory)
        self.index = read_index(directory)
        if split not in self.index.splits:
            raise ValueError(f"split={split!r} is unknown; choose train or validation")
        self._split = self.index.splits[split]
        check_numbers(batch_size, seed, process_index, process_count, seq_len=seq_len)
        self._check_set(tokenizer)
        self.split = split
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self._rows = np.arange(process_index, batch_size, process_count)

        dtype = np.dtype(self.index.dtype).newbyteorder("<")
        self._shards = [
            # Asked for as a plain array: np.memmap's own indexing is several times slower.
            np.asarray(np.memmap(self.directory / shard.name, dtype, "r"))
            for shard in self._split.shards
            if shard.n_bytes
        ]
        self._windows = [
            np.lib.stride_tricks.sliding_window_view(shard, seq_len + 1)
            if len(shard) > seq_len
            else None
            for shard in self._shards
        ]
        self.windows_per_epoch = (self.n_tokens - 1) // seq_len
        if self.windows_per_epoch < 1:
            raise ValueError(
                f"{self.directory}: the {split} split has {self.n_tokens} tokens, too few for one "
                f"row of seq_len={seq_len} and its labels; choose a smaller seq_len or more text"
            )
        left_over = (self.n_tokens - 1) % seq_len
        self._order = EpochOrder(self.windows_per_epoch, seed, stride=seq_len, slack=left_over)

    @property
    def n_tokens(self) -> int:
        """Tokens in the split."""
        return self._split.n_tokens

    @property
    def n_documents(self) -> int:
        """Documents in the split."""
        return self._split.n_documents

    @property
    def n_text_bytes(self) -> int:
        """Bytes of UTF-8 text in the split."""
        return self._split.n_text_bytes

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides what ``batch(step)`` is: tokens, tokenizer and settings.

        The number of processes is not part of it: it does not change the batch.
        """
        hashes = [shard.sha256 for shard in self._split.shards]
        settings = [self.split, self.seq_len, self.batch_size, self.seed]
        parts = [self.index.tokenizer_fingerprint, *hashes, *settings]
        return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()

    def batch(self, step: int) -> Batch:
        """Return this process's rows of the batch of a step.

        Parameters
        ----------
        step : int
            0 is the first.

        Returns
        -------
        dict
            ``tokens`` and ``labels``, int32 [batch_size / process_count, seq_len];
            ``labels[b, t]`` is the token after ``tokens[b, t]``. Together the processes' rows,
            interleaved, are the batch that one process alone would read.
        """
        assert step >= 0
        starts = self._order.places(step * self.batch_size, self._rows)
        windows = self._gather(starts)  # [B, T + 1]
        tokens_BT, labels_BT = windows[:, :-1].astype(np.int32), windows[:, 1:].astype(np.int32)
        return {"tokens": tokens_BT, "labels": labels_BT}

    def _gather(self, starts: npt.NDArray[np.int64]) -> npt.NDArray[np.unsignedinteger]:
        """Return the windows of seq_len + 1 tokens at the given places of the stream."""
        if len(self._shards) == 1 and self._windows[0] is not None:
            return self._windows[0][starts]
        shard, local = np.divmod(starts, self.index.shard_tokens)
        out = np.empty((len(starts), self.seq_len + 1), self._shards[0].dtype)
        for i in np.unique(shard):
            windows = self._windows[i]
            n_windows = 0 if windows is None else len(windows)
            inside = (shard == i) & (local < n_windows)
            if windows is not None:
                out[inside] = windows[local[inside]]
            for row in np.flatnonzero((shard == i) & ~inside):
                out[row] = self.read(int(starts[row]), self.seq_len + 1)
        return out

    def read(self, start: int, length: int) -> npt.NDArray[np.unsignedinteger]:
        """Return `length` tokens of the stream from position `start`, across shards."""
        assert start >= 0
        assert start + length <= self.n_tokens
        out = np.empty(length, self._shards[0].dtype)
        done = 0
        while done < length:
            shard, local = divmod(start + done, self.index.shard_tokens)
            part = self._shards[shard][local : local + length - done]
            out[done : done + len(part)] = part
            done += len(part)
        return out

    def evaluation_batches(self, max_tokens: int | None = None) -> Iterator[Batch]:
        """Yield the split from its beginning, every label exactly once, in batches of one shape.

        Parameters
        ----------
        max_tokens : int, optional
            Stop after so many labels (over all processes).

        Yields
        ------
        dict
            As from `batch`. Labels beyond the end are -100, the tokens there 0; every process gets
            the same number of batches.
        """
        n_labels = self.n_tokens - 1
        if max_tokens is not None:
            n_labels = min(n_labels, max_tokens)
        n_windows = -(-n_labels // self.seq_len)
        for first in range(0, n_windows, self.batch_size):
            tokens_BT = np.zeros((len(self._rows), self.seq_len), np.int32)
            labels_BT = np.full_like(tokens_BT, IGNORED_LABEL)
            for row, window in enumerate(first + self._rows):
                start = int(window) * self.seq_len
                length = min(self.seq_len, n_labels - start)
                if length > 0:
                    stream = self.read(start, length + 1)
                    tokens_BT[row, :length] = stream[:-1]
                    labels_BT[row, :length] = stream[1:]
            yield {"tokens": tokens_BT, "labels": labels_BT}

    def document(self, number: int) -> npt.NDArray[np.unsignedinteger]:
        """Return the tokens of one document of the split, without the end-of-text around it."""
        if not 0 <= number < self.n_documents:
            raise ValueError(f"document {number}: there are 0 to {self.n_documents - 1}")
        starts = np.memmap(self.directory / self._split.starts.name, "<u8", "r")
        n_eot = 0 if self.index.eot_id is None else 1
        is_last = number + 1 == self.n_documents
        end = self.n_tokens if is_last else int(starts[number + 1])
        start = int(starts[number])
        return self.read(start, end - n_eot - start)

    def verify(self) -> None:
        """Read all files of the split and compare their hashes with the index.

        Raises
        ------
        ValueError
            Naming the first file that is not what the index says.
        """
        for entry in (self.index.tokenizer, *self._split.shards, self._split.starts):
            check_hash(self.directory, entry)

    def _check_set(self, tokenizer: Tokenizer | None) -> None:
        for entry in (*self._split.shards, self._split.starts):
            check_size(self.directory, entry)
        check_hash(self.directory, self.index.tokenizer)
        if tokenizer is not None and tokenizer.fingerprint != self.index.tokenizer_fingerprint:
            raise ValueError(
                f"{self.directory}: its tokens were made with tokenizer "
                f"{self.index.tokenizer_fingerprint[:16]} ({self.index.vocab_size} tokens), not "
                f"with the one given, {tokenizer.fingerprint[:16]} ({tokenizer.vocab_size} "
                "tokens); load the one in that folder, or prepare the data again"
            )


def check_numbers(
    batch_size: int, seed: int, process_index: int, process_count: int, *, seq_len: int = 1
) -> None:
    """Raise ValueError with a line for each number of a loader that is out of range."""
    problems = []
    if seq_len < 1:
        problems.append(f"seq_len={seq_len}: a row needs at least 1 token")
    if batch_size < 1:
        problems.append(f"batch_size={batch_size}: a batch needs at least 1 row")
    if not 0 <= seed < 2**64:
        problems.append(f"seed={seed}: choose a number from 0 to 2**64 - 1")
    if process_count < 1 or batch_size % process_count:
        problems.append(
            f"batch_size={batch_size} cannot be shared equally by process_count={process_count}; "
            "choose a multiple of it"
        )
    if not 0 <= process_index < process_count:
        problems.append(f"process_index={process_index}: choose 0 to {process_count - 1}")
    if problems:
        raise ValueError("\n".join(problems))


def batch_bytes(labels: npt.NDArray[np.int32], token_byte_lengths: npt.NDArray[np.int32]) -> int:
    """Return the bytes of text behind the labels of a batch, for bits per byte.

    Parameters
    ----------
    labels : int32 array
        Token ids; -100 counts nothing.
    token_byte_lengths : int32 [vocab_size]
        `Tokenizer.token_byte_lengths`.

    Examples
    --------
    >>> lengths = np.array([0, 1, 3], np.int32)
    >>> batch_bytes(np.array([[1, 2], [0, -100]], np.int32), lengths)
    4
    """
    return int(token_byte_lengths[labels[labels != IGNORED_LABEL]].sum(dtype=np.int64))
