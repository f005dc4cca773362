"""Loader of token rows from a prepared set, an array or a token file.

Names of array axes: R rows, T tokens per row.
"""

import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Unpack, get_args

import numpy as np
import numpy.typing as npt

from tjx_data.corpora.documents import SplitName
from tjx_data.errors import DataError
from tjx_data.loading.base import Batch, Batching, Loader, RowIndices
from tjx_data.loading.evaluation_rows import evaluation_batches
from tjx_data.loading.samplers import EpochSampler, IndependentSampler
from tjx_data.loading.shard_reader import Tokens
from tjx_data.loading.token_arrays import open_tokens
from tjx_data.loading.token_files import IdDtype
from tjx_data.loading.token_source import PreparedSplit, TokenSource, read_chunk
from tjx_data.prepared.packing import Packing, packed_rows
from tjx_data.tokenization.tokenizer import Tokenizer

PackingKind = Literal["windows", "documents"]
WindowOrder = Literal["shifted", "random", "aligned"]

# Windows of several steps are read together up to this size, unless reading takes longer than this:
# on a slow disk, a step should not wait for the windows of later ones.
_MAX_BLOCK_BYTES = 1 << 20
_MAX_BLOCK_SECONDS = 2e-3


class _Block(NamedTuple):
    """Windows of consecutive steps."""

    first_step: int
    offsets: npt.NDArray[np.int64]  # [steps, R]
    windows: Tokens  # [steps, R, T + 1]
    fast: bool  # whether the read was so short that the next block may be larger


class TokenLoader(Loader):
    """Rows of tokens from a prepared set, or from your own arrays and files (`from_tokens`).

    Labels are the next tokens.

    With ``packing="windows"`` a row is a window of `seq_len` tokens of the split's token stream.
    `windows` selects where windows start:

    - "shifted": each epoch cuts the stream, treated as a ring, at a new uniform random offset.
      Every label occurs once per epoch, and fewer than `seq_len` of them twice, to fill the last
      window.
    - "random": each window starts at an independent uniform offset, as in nanoGPT. There are no
      epochs, and labels repeat before all have occurred.
    - "aligned": the order of tjx-data 0.1, to resume runs that were started with it. Windows start
      at multiples of `seq_len` plus at most (n_tokens - 1) mod seq_len, so that each epoch has
      nearly the same windows.

    With ``packing="documents"`` a row holds whole documents, each a segment with its own positions
    (see `tjx_data.prepared.packing`); every token is a label once per epoch.

    Except with "random", each epoch visits the rows in its own order, a function of (seed, epoch),
    and batches continue across epochs without a gap. ``batch(step)`` depends on the arguments
    only.

    Parameters
    ----------
    directory : str, Path or TokenSource
        A prepared set, or another source of tokens (see `from_tokens`).
    split : {"train", "validation"}
        Split to read.
    seq_len : int
        Tokens per row.
    packing : {"windows", "documents"}
        Content of a row.
    windows : {"shifted", "random", "aligned"}
        Window starts; ignored with packing "documents".
    tokenizer : Tokenizer, optional
        The tokenizer that the caller will use; it must have made the set.
    **batching
        batch_size, seed, process_index and process_count, as of `Loader`.

    Raises
    ------
    ValueError
        If an argument is invalid, or the set is damaged, made with another tokenizer, or shorter
        than one row.

    Examples
    --------
    >>> import tempfile
    >>> from tjx_data import byte_tokenizer, prepare
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = prepare(["one text", "another text"], byte_tokenizer(), f"{folder}/set",
    ...                 holdout="tail", holdout_fraction=0.5)
    ...     TokenLoader(f"{folder}/set", seq_len=4, batch_size=2).batch(7)["tokens"].shape
    (2, 4)
    """

    def __init__(
        self,
        directory: str | Path | TokenSource,
        *,
        split: SplitName = "train",
        seq_len: int,
        packing: PackingKind = "windows",
        windows: WindowOrder = "shifted",
        tokenizer: Tokenizer | None = None,
        **batching: Unpack[Batching],
    ) -> None:
        problems = []
        if seq_len < 1:
            problems.append(f"seq_len: got {seq_len}; expected at least 1")
        for name, value, allowed in (
            ("packing", packing, get_args(PackingKind)),
            ("windows", windows, get_args(WindowOrder)),
            ("split", split, get_args(SplitName)),
        ):
            if value not in allowed:
                problems.append(f"{name}: got {value!r}; expected one of {', '.join(allowed)}")
        super().__init__(problems=problems, **batching)
        self.split, self.seq_len, self.packing = split, seq_len, packing
        self.windows = windows
        if isinstance(directory, TokenSource):
            self.source: TokenSource = directory
        else:
            self.source = PreparedSplit(directory, split, tokenizer)
        self._tokens = self.source.reader
        self._packed: Packing | None = None
        self._n_labels = max(self.n_tokens - 1, 0)
        if packing == "documents":
            self._packed = self.source.packing(seq_len)
            self.rows_per_epoch = self._packed.n_rows
        else:
            whole, rest = divmod(self._n_labels, seq_len)
            self.rows_per_epoch = whole + (windows == "shifted" and whole > 0 and rest > 0)
        if self.rows_per_epoch < 1:
            raise ValueError(
                f"seq_len: got {seq_len}; expected less than the {self.n_tokens} tokens of "
                f"{self.source.name}; choose a smaller seq_len or more text"
            )
        self._sampler = self._make_sampler()
        self._block: _Block | None = None

    @classmethod
    def from_tokens(
        cls,
        tokens: npt.ArrayLike | str | Path,
        *,
        vocab_size: int,
        id_dtype: IdDtype = "auto",
        seq_len: int,
        windows: WindowOrder = "shifted",
        **batching: Unpack[Batching],
    ) -> "TokenLoader":
        """Return a loader of your own token ids: an array, a memmap, or a file.

        Parameters
        ----------
        tokens : array of int, str or Path
            Token ids [n_tokens] of any integer dtype, which are not copied; or the path of a
            ``.npy`` file, or of a ``.bin`` file of raw uint16 or uint32, as nanoGPT's prepare.py
            writes it, or with llm.c's header. A path is safer than a memmap: access to a memmap
            of a truncated file kills the process.
        vocab_size : int
            Ids are below it; checked with every read.
        id_dtype : {"auto", "uint16", "uint32"}
            Dtype of a ``.bin`` file without a header; "auto" is uint16, or uint32 if the vocabulary
            has more than 65,536 ids.
        seq_len, windows, **batching
            As of the class.

        Returns
        -------
        TokenLoader
            The loader.

        Raises
        ------
        ValueError
            If an argument is invalid, or the file is damaged or of another format.

        Examples
        --------
        >>> loader = TokenLoader.from_tokens(np.arange(99), vocab_size=99, seq_len=8, batch_size=4)
        >>> batch = loader.batch(3)
        >>> bool((batch["labels"] == batch["tokens"] + 1).all())
        True
        """
        return cls(
            open_tokens(tokens, vocab_size=vocab_size, id_dtype=id_dtype),
            seq_len=seq_len,
            windows=windows,
            **batching,
        )

    def _make_sampler(self) -> EpochSampler | IndependentSampler:
        """Return the sampler of packed rows by number, or of windows by their start."""
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
        """Number of tokens in the split."""
        return self.source.n_tokens

    @property
    def n_documents(self) -> int:
        """Number of documents in the split."""
        return self.source.n_documents

    @property
    def n_text_bytes(self) -> int:
        """Number of bytes of UTF-8 text in the split."""
        return self.source.n_text_bytes

    @property
    def identity(self) -> Mapping[str, str]:
        """Everything that determines the content of a row, by name."""
        # No entry means aligned windows, as in tjx-data 0.1.
        has_order = self.packing == "windows" and self.windows != "aligned"
        return {
            **({"windows": self.windows} if has_order else {}),
            **self.source.identity,
            "split": self.split,
            "packing": self.packing,
            "seq_len": str(self.seq_len),
            "seed": str(self.seed),
        }

    def rows(self, row_indices: RowIndices) -> Batch:
        """Return token rows by index; raise `DataError` if a shard is missing or changed.

        ``labels[r, t]`` is the token after ``tokens[r, t]``, int32 [R, seq_len]. With packing
        "documents" also ``segment_ids``, from 1, and ``positions``, from 0 in each segment; padding
        has token 0, label -100 and segment 0.
        """
        self._tokens.check_unchanged()
        offsets = self._sampler.offsets(row_indices)
        if self._packed is not None:
            places = [(self._packed, number) for number in offsets.tolist()]
            return packed_rows(places, self.seq_len, partial(read_chunk, self._tokens))
        return self._windows_batch(offsets, self._windows(offsets))

    def batch(self, step: int) -> Batch:
        """Return this process's rows of a batch; windows of several steps are read together."""
        if self._packed is not None:
            return super().batch(step)
        assert step >= 0
        self._tokens.check_unchanged()
        block = self._block
        if block is None or not 0 <= step - block.first_step < len(block.offsets):
            try:
                block = self._read_block(step, self._steps_to_read(step))
            except DataError:  # perhaps in a later step
                block = self._read_block(step, 1)
            self._block = block
        number = step - block.first_step
        return self._windows_batch(block.offsets[number], block.windows[number])

    def _steps_to_read(self, step: int) -> int:
        """Return the steps to read together: more while they come in order and the disk is fast."""
        block = self._block
        if block is None or not block.fast or step != block.first_step + len(block.offsets):
            return 1
        limit: int = _MAX_BLOCK_BYTES // block.windows[0].nbytes
        return max(1, min(2 * len(block.offsets), limit))

    def _read_block(self, step: int, n_steps: int) -> _Block:
        start = time.perf_counter()
        steps = np.arange(step, step + n_steps)[:, None]
        rows = steps * self.batch_size + self._local_rows
        offsets = self._sampler.offsets(rows.ravel())
        windows = self._windows(offsets).reshape(*rows.shape, -1)
        fast = time.perf_counter() - start < _MAX_BLOCK_SECONDS
        return _Block(step, offsets.reshape(rows.shape), windows, fast)

    def _windows(self, offsets: npt.NDArray[np.int64]) -> Tokens:
        """Return the tokens of windows [R, T + 1]; a window that wraps around is not complete."""
        starts = np.minimum(offsets, self._n_labels - self.seq_len)
        return self._tokens.windows(starts, self.seq_len + 1)

    def _windows_batch(self, offsets: npt.NDArray[np.int64], windows: Tokens) -> Batch:
        windows = windows.astype(np.int32)
        tokens, labels = windows[:, :-1], windows[:, 1:]
        last = self._n_labels - self.seq_len
        if offsets.max() > last:  # at most one row per epoch
            tokens, labels = tokens.copy(), labels.copy()
            for row in np.flatnonzero(offsets > last).tolist():
                tokens[row], labels[row] = self._wrapped_window(int(offsets[row]))
        return {"tokens": tokens, "labels": labels}

    def _wrapped_window(self, start: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Return tokens and labels [T] of a window that wraps around the end of the stream."""
        head = self._n_labels - start
        parts = [self.read(start, head + 1), self.read(0, self.seq_len - head + 1)]
        tokens, labels = (
            np.concatenate([part[cut] for part in parts]).astype(np.int32)
            for cut in (slice(None, -1), slice(1, None))
        )
        return tokens, labels

    def read(self, start: int, length: int) -> npt.NDArray[np.unsignedinteger]:
        """Return tokens ``start`` to ``start + length - 1`` of the stream, across shards.

        Parameters
        ----------
        start : int
            First token, from 0.
        length : int
            Number of tokens.

        Returns
        -------
        uint16 or uint32 array [length]
            The tokens.
        """
        return self._tokens.read(start, length)

    def evaluation_batches(self, limit: int | None = None) -> Iterator[Batch]:
        """Yield each label of the split once; `limit` counts labels, or tokens of packed documents.

        Windows come in stream order; packed rows come in a fixed shuffled order, since packing
        sorts rows by document length. Tokens beyond the end are 0.
        """
        return evaluation_batches(
            self.source.reader, self._packed, limit, n_labels=self._n_labels, seq_len=self.seq_len,
            batch_size=self.batch_size, local_rows=self._local_rows,
        )  # fmt: skip

    def document(self, number: int) -> npt.NDArray[np.unsignedinteger]:
        """Return the tokens of one document of the split, without end-of-text tokens.

        Parameters
        ----------
        number : int
            Number of the document in the split, from 0.

        Returns
        -------
        uint16 or uint32 array [tokens]
            The tokens.
        """
        return self.source.document(number)

    def verify(self) -> None:
        """Compare the SHA-256 of every file of the tokens with its record.

        Raises
        ------
        DataError
            If a file differs; the message names the first one.
        """
        self.source.verify()
