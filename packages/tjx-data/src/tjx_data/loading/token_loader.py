"""Reading a prepared set: rows of text that are a pure function of (seed, turn).

Names of array axes: R rows, T tokens in a row.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from tjx_data.corpora.documents import SplitName
from tjx_data.loading.base import IGNORED_LABEL, Batch, Loader, RowIndices
from tjx_data.loading.samplers import EpochSampler, IndependentSampler
from tjx_data.loading.shard_reader import ShardReader
from tjx_data.prepared.index import check_hash, check_hashes, check_shard, check_size, read_index
from tjx_data.prepared.packing import Packing, open_packing
from tjx_data.tokenization.tokenizer import Tokenizer

PackingKind = Literal["windows", "documents"]
WindowOrder = Literal["shifted", "random", "aligned"]


class TokenLoader(Loader):
    """Rows of tokens from a prepared set.

    Packing "windows": a row is a window of `seq_len` tokens of the split's stream, with the next
    token of each as its label. `windows` says where windows start:

    - "shifted": each epoch cuts the stream, joined end to start, from a position of its own,
      uniform over the split. Every label comes once an epoch, and fewer than `seq_len` of them
      twice, to fill the last window.
    - "random": each window starts at an independent uniform position, as in nanoGPT. There are no
      epochs; some labels come more often than others.
    - "aligned": the order of tjx-data 0.1. Windows start at multiples of `seq_len` plus at most
      (n_tokens - 1) mod seq_len, so that nearly the same windows come in each epoch. For resuming
      runs that were started with it.

    Packing "documents": a row holds whole documents, each a segment with positions of its own, as
    decided by `tjx_data.prepared.packing`; every token is a label once an epoch.

    Except with "random", each epoch visits the rows in an order of its own, drawn from
    (seed, epoch), and batches continue from one epoch into the next without a gap. There is no
    state: ``batch(step)`` depends on the arguments alone.

    Parameters
    ----------
    directory : str or Path
        A prepared set.
    split : {"train", "validation"}
        Which part of it.
    seq_len : int
        Tokens in a row.
    batch_size, seed, process_index, process_count
        As of every `Loader`.
    packing : {"windows", "documents"}
        What a row holds.
    windows : {"shifted", "random", "aligned"}
        Where windows start; without meaning for packing "documents".
    tokenizer : Tokenizer, optional
        The tokenizer that the caller will use; another than the set's is refused.

    Raises
    ------
    ValueError
        If the set is damaged or made with another tokenizer, or is too short for a row, or a
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
        packing: PackingKind = "windows",
        windows: WindowOrder = "shifted",
        tokenizer: Tokenizer | None = None,
    ):
        problems = []
        if seq_len < 1:
            problems.append(f"seq_len={seq_len}: a row needs at least 1 token")
        if packing not in ("windows", "documents"):
            problems.append(f"packing={packing!r} is unknown; choose windows or documents")
        if windows not in get_args(WindowOrder):
            problems.append(f"windows={windows!r} is unknown; choose shifted, random or aligned")
        if split not in ("train", "validation"):
            problems.append(f"split={split!r} is unknown; choose train or validation")
        super().__init__(
            batch_size=batch_size,
            seed=seed,
            process_index=process_index,
            process_count=process_count,
            problems=problems,
        )
        self.directory = Path(directory)
        self.index = read_index(directory)
        self.split, self.seq_len, self.packing = split, seq_len, packing
        self.windows = windows
        self._split = self.index.splits[split]
        self._check_set(tokenizer)
        self._shards = ShardReader(self.directory, self.index, split)
        self._packed: Packing | None = None
        self._n_labels = max(self.n_tokens - 1, 0)
        if packing == "documents":
            self._packed = open_packing(self.directory, split, seq_len)
            self.rows_per_epoch = self._packed.n_rows
        else:
            whole, rest = divmod(self._n_labels, seq_len)
            self.rows_per_epoch = whole + (windows == "shifted" and whole > 0 and rest > 0)
        if self.rows_per_epoch < 1:
            raise ValueError(
                f"{self.directory}: the {split} split has {self.n_tokens} tokens, too few for one "
                f"row of seq_len={seq_len} and its labels; choose a smaller seq_len or more text"
            )
        self._order = self._make_order()

    def _make_order(self) -> EpochSampler | IndependentSampler:
        """Return the order of the rows: of documents by number, of windows by their start."""
        count, length, n_labels = self.rows_per_epoch, self.seq_len, self._n_labels
        if self._packed is not None:
            return EpochSampler(count, self.seed)
        if self.windows == "random":
            return IndependentSampler(n_labels - length + 1, self.seed)
        if self.windows == "aligned":
            return EpochSampler(count, self.seed, stride=length, slack=n_labels % length)
        return EpochSampler(count, self.seed, stride=length, slack=n_labels - 1, ring=n_labels)

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
    def identity(self) -> Mapping[str, str]:
        """All that decides what a row is, by name."""
        hashes = "".join(shard.sha256 for shard in self._split.shards)
        # Without an entry the windows are aligned, as in tjx-data 0.1.
        has_order = self.packing == "windows" and self.windows != "aligned"
        return {
            **({"windows": self.windows} if has_order else {}),
            "tokens": hashlib.sha256(hashes.encode()).hexdigest(),
            "tokenizer": self.index.tokenizer_fingerprint,
            "split": self.split,
            "packing": self.packing,
            "seq_len": str(self.seq_len),
            "seed": str(self.seed),
        }

    def rows(self, turns: RowIndices) -> Batch:
        """Return the rows of some turns.

        Returns
        -------
        dict
            ``tokens`` and ``labels``, int32 [R, seq_len]; ``labels[r, t]`` is the token after
            ``tokens[r, t]``. With packing "documents" also ``segment_ids`` (from 1; 0 is room that
            was left, where the token is 0 and the label -100) and ``positions``, which begin at 0
            in each segment.

        Raises
        ------
        DataError
            Naming a shard that vanished, was changed, or cannot be read.
        """
        self._shards.look()
        places = self._order.places(turns)
        if self._packed is not None:
            return self._packed_rows(self._packed, places)
        last = self._n_labels - self.seq_len
        starts = np.minimum(places, last)
        windows = self._shards.windows(starts, self.seq_len + 1).astype(np.int32)  # [R, T + 1]
        tokens, labels = windows[:, :-1], windows[:, 1:]
        wrapped = np.flatnonzero(places > last).tolist()  # at most one an epoch
        if wrapped:
            tokens, labels = tokens.copy(), labels.copy()
            for row in wrapped:
                tokens[row], labels[row] = self._wrapped_window(int(places[row]))
        return {"tokens": tokens, "labels": labels}

    def _wrapped_window(self, start: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Return tokens and labels [T] of a window that continues at the start of the stream."""
        head = self._n_labels - start
        parts = [self.read(start, head + 1), self.read(0, self.seq_len - head + 1)]
        tokens, labels = (
            np.concatenate([part[cut] for part in parts]).astype(np.int32)
            for cut in (slice(None, -1), slice(1, None))
        )
        return tokens, labels

    def _packed_rows(self, packed: Packing, places: RowIndices) -> Batch:
        shape = (len(places), self.seq_len)
        tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
        labels = np.full(shape, IGNORED_LABEL, np.int32)
        for row, place in enumerate(places):
            at = 0
            stretches = range(packed.rows[place], packed.rows[place + 1])
            for segment, stretch in enumerate(stretches, start=1):
                length = int(packed.lengths[stretch])
                stream = self.read(int(packed.starts[stretch]), length + 1)
                here = slice(at, at + length)
                tokens[row, here], labels[row, here] = stream[:-1], stream[1:]
                segments[row, here] = segment
                positions[row, here] = np.arange(length)
                at += length
        return {
            "tokens": tokens, "labels": labels, "segment_ids": segments, "positions": positions
        }  # fmt: skip

    def read(self, start: int, length: int) -> npt.NDArray[np.unsignedinteger]:
        """Return `length` tokens of the stream from position `start`, across shards."""
        return self._shards.read(start, length)

    def evaluation_batches(self, limit: int | None = None) -> Iterator[Batch]:
        """Yield each label of the split once, in batches of one shape.

        Windows come in the order of the text, rows of documents in an order of their own.

        Parameters
        ----------
        limit : int, optional
            Labels to yield at most; of documents, what fits in so many tokens.

        Yields
        ------
        dict
            As from `rows`. Labels beyond the end are -100, the tokens there 0; every process gets
            the same number of batches.
        """
        n_labels = self.n_tokens - 1
        if self._packed is not None:
            n_labels = self._packed.n_rows * self.seq_len
        if limit is not None:
            n_labels = min(n_labels, limit)
        n_rows = -(-n_labels // self.seq_len)
        order = EpochSampler(self.rows_per_epoch, 0)  # long documents would come first
        for first in range(0, n_rows, self.batch_size):
            self._shards.look()
            numbers = first + self._rows
            if self._packed is None:
                yield self._last_windows(numbers, n_labels)
                continue
            batch = self._packed_rows(self._packed, order.places(np.minimum(numbers, n_rows - 1)))
            for name, values in batch.items():
                values[numbers >= n_rows] = IGNORED_LABEL if name == "labels" else 0
            yield batch

    def _last_windows(self, numbers: RowIndices, n_labels: int) -> Batch:
        """Return windows by number, of which the last may be short, and those after it empty."""
        tokens = np.zeros((len(numbers), self.seq_len), np.int32)
        labels = np.full_like(tokens, IGNORED_LABEL)
        for row, window in enumerate(numbers.tolist()):
            start = window * self.seq_len
            length = min(self.seq_len, n_labels - start)
            if length > 0:
                stream = self.read(start, length + 1)
                tokens[row, :length] = stream[:-1]
                labels[row, :length] = stream[1:]
        return {"tokens": tokens, "labels": labels}

    def document(self, number: int) -> npt.NDArray[np.unsignedinteger]:
        """Return the tokens of one document of the split, without the end-of-text around it."""
        if not 0 <= number < self.n_documents:
            raise ValueError(f"document {number}: there are 0 to {self.n_documents - 1}")
        file = self.directory / self._split.starts.name
        bounds = [*np.fromfile(file, "<u8", 2, offset=8 * number).tolist(), self.n_tokens]
        start, end = bounds[:2]
        end -= 0 if self.index.eot_id is None else 1
        if not 0 <= start <= end < self.n_tokens:
            check_hash(self.directory, self._split.starts)
        return self.read(start, end - start)

    def verify(self) -> None:
        """Read all files of the split and compare their hashes with the index.

        Raises
        ------
        ValueError
            Naming the first file that is not what the index says.
        """
        check_hashes(self.directory, self.index.files(self.split))

    def _check_set(self, tokenizer: Tokenizer | None) -> None:
        for number in range(len(self._split.shards)):
            check_shard(self.directory, self.index, self.split, number)
        check_size(self.directory, self._split.starts)
        check_hash(self.directory, self.index.tokenizer)
        if tokenizer is not None and tokenizer.fingerprint != self.index.tokenizer_fingerprint:
            raise ValueError(
                f"{self.directory}: its tokens were made with tokenizer "
                f"{self.index.tokenizer_fingerprint[:16]} ({self.index.vocab_size} tokens), not "
                f"with the one given, {tokenizer.fingerprint[:16]} ({tokenizer.vocab_size} "
                "tokens); load the one in that folder, or prepare the data again"
            )


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
