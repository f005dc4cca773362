"""Reading a prepared set: rows of text that are a pure function of (seed, turn).

Names of array axes: R rows, T tokens in a row.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from tjx_data.corpora.documents import SplitName
from tjx_data.loading.batches import IGNORED_LABEL, Batch, Loader, Turns
from tjx_data.loading.epochs import EpochOrder
from tjx_data.loading.shards import Shards
from tjx_data.prepared.index import check_hash, check_hashes, check_shard, check_size, read_index
from tjx_data.prepared.packing import Packing, open_packing
from tjx_data.tokenization.tokenizer import Tokenizer

PackingKind = Literal["windows", "documents"]


class TokenLoader(Loader):
    """Rows of tokens from a prepared set.

    Packing "windows": the stream of a split is cut into windows of `seq_len` tokens, each with its
    next tokens as labels, so that every token is a label in one window. The (n_tokens - 1) mod
    seq_len labels that fill no window are others in each epoch. Packing "documents": a row holds
    whole documents, each a segment with positions of its own, as decided by
    `tjx_data.prepared.packing`; every token is a label once an epoch.

    Each epoch visits the rows in an order of its own, drawn from (seed, epoch), and batches go on
    from one epoch into the next without a gap. There is no state: ``batch(step)`` depends on the
    arguments alone.

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
        tokenizer: Tokenizer | None = None,
    ):
        problems = []
        if seq_len < 1:
            problems.append(f"seq_len={seq_len}: a row needs at least 1 token")
        if packing not in ("windows", "documents"):
            problems.append(f"packing={packing!r} is unknown; choose windows or documents")
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
        self._split = self.index.splits[split]
        self._check_set(tokenizer)
        self._shards = Shards(self.directory, self.index, split)
        self._packed: Packing | None = None
        if packing == "documents":
            self._packed = open_packing(self.directory, split, seq_len)
            self.rows_per_epoch = self._packed.n_rows
            self._order = EpochOrder(self.rows_per_epoch, seed)
        else:
            self.rows_per_epoch = max(self.n_tokens - 1, 0) // seq_len
            slack = (self.n_tokens - 1) % seq_len
            self._order = EpochOrder(self.rows_per_epoch, seed, stride=seq_len, slack=slack)
        if self.rows_per_epoch < 1:
            raise ValueError(
                f"{self.directory}: the {split} split has {self.n_tokens} tokens, too few for one "
                f"row of seq_len={seq_len} and its labels; choose a smaller seq_len or more text"
            )

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
        return {
            "tokens": hashlib.sha256(hashes.encode()).hexdigest(),
            "tokenizer": self.index.tokenizer_fingerprint,
            "split": self.split,
            "packing": self.packing,
            "seq_len": str(self.seq_len),
            "seed": str(self.seed),
        }

    def rows(self, turns: Turns) -> Batch:
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
        windows = self._shards.windows(places, self.seq_len + 1).astype(np.int32)  # [R, T + 1]
        return {"tokens": windows[:, :-1], "labels": windows[:, 1:]}

    def _packed_rows(self, packed: Packing, places: Turns) -> Batch:
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
        order = EpochOrder(self.rows_per_epoch, 0)  # long documents would come first
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

    def _last_windows(self, numbers: Turns, n_labels: int) -> Batch:
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
