"""Loader of batches from a stream of documents without random access, with a saved state.

Names of array axes: B rows, T tokens per row.
"""

import copy
import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tjx_core import ConfigError
from tjx_data.corpora.documents import is_empty
from tjx_data.loading.base import Batch, validate_batching
from tjx_data.loading.samplers import Words, derive_key, permute_indices
from tjx_data.loading.stream_source import CountingSource, StatefulSource, document_text
from tjx_data.prepared.tokenize_parts import token_dtype
from tjx_data.tokenization.tokenizer import Tokenizer

FORMAT = "tjx-data stream 1"
CHUNK_CHARACTERS = 1 << 17
"""About as many characters of documents are tokenized together."""

Tokens = npt.NDArray[np.unsignedinteger]


class _Position(NamedTuple):
    """Start of a chunk of documents; stored in the state, field names included."""

    source: dict[str, Any]
    epoch: int
    document: int  # of the epoch, over all processes
    token: int  # of this process's token stream


class _Chunk(NamedTuple):
    position: _Position
    digest: bytes  # SHA-256 of its tokens


class StreamLoader:
    """Batches from documents in their own order, tokenized on the fly.

    The token stream is ``<end of text> document <end of text> document <end of text> ...``, as in a
    prepared set, cut into windows of `seq_len` tokens with next-token labels; empty documents are
    skipped. With `shuffle_buffer`, each group of this many windows is shuffled in an order that is
    a function of (seed, number of the group). Documents left at the end that fill no batch are
    dropped.

    A restored stream returns exactly the batches that would have followed. It has limits that a
    prepared set (`tjx_data.prepare`) does not have: only the next batch can be read; batches depend
    on the number of processes; resuming needs the same settings and unchanged documents; and a
    source that buffers documents, such as a dataset with a shuffle buffer, cannot be resumed.

    Parameters
    ----------
    documents : Iterable
        Texts, or mappings with a text. A source with ``state_dict`` and ``load_state_dict``, such
        as a streaming `datasets.IterableDataset`, resumes from its own state. Any other source is
        read again from the start, so it must not be an iterator. ``set_epoch`` of a dataset is
        called before each pass, so that it can reorder its shards.
    tokenizer : Tokenizer
        Encodes the documents.
    seq_len : int
        Tokens per row.
    batch_size : int
        Rows in a batch over all processes.
    process_index, process_count : int
        This process uses the documents process_index, process_index + process_count, ... and
        returns batch_size / process_count rows of each batch. Each process reads all documents. For
        a dataset of many shards, give each process its own shards instead (as
        `datasets.distributed.split_dataset_by_node` does), with its own batch size.
    shuffle_buffer : int
        Windows that are shuffled together; up to twice as many are in memory. 0 keeps the order.
    seed : int
        Seed of the order, 0 to 2**64 - 1.
    epochs : int or None
        Passes over the documents; None is endless. Several processes need None, since their
        documents do not give the same number of batches.
    field : str
        Name of the text field if documents are mappings.

    Raises
    ------
    ValueError
        If an argument is invalid, or `documents` can be read only once.
    """

    def __init__(
        self,
        documents: Iterable[Any],
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
        shuffle_buffer: int = 0,
        seed: int = 0,
        epochs: int | None = 1,
        field: str = "text",
    ) -> None:
        problems = validate_batching(batch_size, seed, process_index, process_count)
        problems += _validate(seq_len, shuffle_buffer, epochs)
        if not isinstance(documents, StatefulSource) and iter(documents) is documents:
            problems.append(
                "documents: got an iterator, which can be read only once; expected a list, "
                "Documents, a streaming dataset, or another re-readable source"
            )
        if problems:
            raise ConfigError(problems)
        if hasattr(documents, "select_columns"):  # reset a dataset and keep only its text
            documents = documents.select_columns([field])
        if not isinstance(documents, StatefulSource):
            documents = CountingSource(documents)
        self._source: StatefulSource = documents
        self._tokenizer, self._dtype = tokenizer, token_dtype(tokenizer)
        self.seq_len, self.batch_size, self.seed = seq_len, batch_size, seed
        self.process_index, self.process_count = process_index, process_count
        self._group_size = max(shuffle_buffer, 1)
        self._epochs, self._field = epochs, field
        self._source_start = copy.deepcopy(self._source.state_dict())
        self._seek(_Position(self._source_start, 0, 0, 0), row=0)

    @property
    def settings(self) -> dict[str, int | str | None]:
        """Everything that determines the batches besides the documents, by name."""
        return {
            "tokenizer": self._tokenizer.fingerprint,
            "seq_len": self.seq_len,
            "batch_size": self.batch_size,
            "process_index": self.process_index,
            "process_count": self.process_count,
            "shuffle_buffer": self._group_size,
            "seed": self.seed,
            "epochs": self._epochs,
            "field": self._field,
        }

    def next_batch(self) -> Batch:
        """Return this process's rows of the next batch.

        Returns
        -------
        dict
            ``tokens`` and ``labels``, int32 [batch_size / process_count, seq_len]; ``labels[b, t]``
            is the token after ``tokens[b, t]``.

        Raises
        ------
        EOFError
            At the end of the last pass, when no complete batch is left.
        ValueError
            If a document is no text, or a pass has none.
        """
        windows_BT = self.next_rows(self.batch_size // self.process_count)
        return {"tokens": windows_BT[:, :-1], "labels": windows_BT[:, 1:]}

    @property
    def row(self) -> int:
        """Number of rows that this process has read."""
        return self._row

    def next_rows(self, n_rows: int) -> npt.NDArray[np.int32]:
        """Return this process's next rows as windows, int32 [n_rows, seq_len + 1].

        Parameters
        ----------
        n_rows : int
            Number of rows.

        Returns
        -------
        int32 array [n_rows, seq_len + 1]
            Tokens of a row, and the label of the last one.

        Raises
        ------
        EOFError, ValueError
            As `next_batch`.
        """
        rows = np.empty((n_rows, self.seq_len + 1), self._dtype)
        for i in range(n_rows):
            window = self._next_row()
            if window is None:
                raise EOFError(
                    f"the documents end after {self._row // n_rows} batches (epochs="
                    f"{self._epochs}); give more epochs, or epochs=None for an endless stream"
                )
            rows[i] = window
        return rows.astype(np.int32)

    def restart(self) -> None:
        """Continue from the first row."""
        self._seek(_Position(copy.deepcopy(self._source_start), 0, 0, 0), row=0)

    def state(self) -> dict[str, Any]:
        """Return the state from which `restore` continues after the last batch.

        It is small and consists of JSON values: the position of the documents whose tokens are
        still in use, the number of chunks read since, and a hash of their tokens. With prefetching,
        take it together with the batch: ``(stream.next_batch(), stream.state())``.

        Raises
        ------
        ValueError
            If the state of the documents cannot be written as JSON.
        """
        position = self._chunks[0].position if self._chunks else self._position
        try:
            source = json.loads(json.dumps(position.source))
        except TypeError as error:
            raise ValueError(
                f"documents: state_dict() cannot be written as JSON: {error}"
            ) from error
        return {
            "format": FORMAT,
            "settings": self.settings,
            "row": self._row,
            "place": {**position._asdict(), "source": source},
            "chunks": len(self._chunks),
            "sha256": self._digest(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state: the next batch is the same as after that state was saved.

        Parameters
        ----------
        state : Mapping
            From `state`, of a stream with the same settings and documents.

        Raises
        ------
        ValueError
            If the state has another format or other settings, or the documents changed.
        """
        _check_state(state, self.settings)
        self._seek(_Position(**copy.deepcopy(state["place"])), row=state["row"])
        while len(self._chunks) < state["chunks"] and not self._ended:
            self._read_chunk()
        if self._digest() != state["sha256"]:
            raise ValueError(
                "state: the documents at its position changed since it was saved; restore the "
                "documents, or start a new stream. A dataset with a shuffle buffer, or a source "
                "that is read in another order each time, cannot be resumed: use shuffle_buffer"
            )

    def _seek(self, position: _Position, *, row: int) -> None:
        """Empty all buffers and continue at a row whose group starts at or after a position."""
        self._iterator: Iterator[Any] | None = None
        self._position, self._row = position, row  # of the next chunk, and the next row
        self._chunks: deque[_Chunk] = deque()  # chunks whose tokens are still in use
        self._first_window = row - row % self._group_size
        self._windows: deque[Tokens] = deque()  # [T + 1] each, from the first of the group
        self._order: Words | None = None  # permutation of the group
        self._rest = np.empty(0, self._dtype)  # tokens that fill no window yet
        self._to_drop = self._first_window * self.seq_len - position.token
        self._found_text = position.document > 0  # in this pass
        self._ended = False

    def _next_row(self) -> Tokens | None:
        """Return the next row in shuffled order, or None at the end."""
        group, within = divmod(self._row, self._group_size)
        # Reading one window for each row returned avoids a pause at the start of a group.
        needed = within + self._group_size
        while len(self._windows) < needed and not self._ended:
            self._read_chunk()
        if within == 0 or self._order is None:  # the group is complete, or the documents ended
            size = min(self._group_size, len(self._windows))
            numbers = np.arange(size, dtype=np.uint64)
            key = derive_key(self.seed, group)
            self._order = permute_indices(numbers, size, key) if size else numbers
        if within >= len(self._order):
            return None
        window = self._windows[int(self._order[within])]
        self._row += 1
        if self._row % self._group_size == 0:
            self._drop_group()
        return window

    def _drop_group(self) -> None:
        """Discard the windows of a finished group, and chunks before the next one."""
        for _ in range(self._group_size):
            self._windows.popleft()
        self._first_window = self._row
        while self._chunks:
            after = self._chunks[1].position if len(self._chunks) > 1 else self._position
            if after.token > self._first_window * self.seq_len:
                break
            self._chunks.popleft()

    def _read_chunk(self) -> None:
        """Read and tokenize the next documents, or detect the end."""
        position = self._position
        texts, after = self._read_texts(position)
        if texts:
            tokens = self._tokenize(texts, is_first=position.token == 0)
            self._chunks.append(_Chunk(position, hashlib.sha256(tokens.tobytes()).digest()))
            after = after._replace(token=position.token + len(tokens))
            self._add_windows(tokens)
        self._position = after

    def _read_texts(self, position: _Position) -> tuple[list[str], _Position]:
        """Read this process's next documents of a pass, and return the position after them."""
        if self._iterator is None:
            if hasattr(self._source, "set_epoch"):
                self._source.set_epoch(position.epoch)
            self._source.load_state_dict(copy.deepcopy(position.source))
            self._iterator = iter(self._source)
        texts: list[str] = []
        n_characters, number = 0, position.document
        for number, document in enumerate(self._iterator, start=position.document + 1):
            if (number - 1) % self.process_count != self.process_index:
                continue
            text = document_text(document, number, self._field)
            if not is_empty(text):
                texts.append(text)
                n_characters += len(text)
                self._found_text = True
            if n_characters >= CHUNK_CHARACTERS:
                source = copy.deepcopy(self._source.state_dict())
                return texts, position._replace(source=source, document=number)
        if not self._found_text:
            raise ValueError(
                f"documents: process {self.process_index} of {self.process_count} found no text in "
                f"a pass over {number} documents; expected some for each process"
            )
        self._iterator, self._found_text = None, False
        self._ended = position.epoch + 1 == self._epochs
        return texts, _Position(self._source_start, position.epoch + 1, 0, position.token)

    def _tokenize(self, texts: list[str], *, is_first: bool) -> Tokens:
        eot = [] if self._tokenizer.eot_id is None else [self._tokenizer.eot_id]
        parts = [eot] if is_first else []
        for ids in self._tokenizer.encode_batch(texts):
            parts += [ids, eot]
        return np.concatenate([np.array(part, self._dtype) for part in parts])

    def _add_windows(self, tokens: Tokens) -> None:
        """Cut new tokens into windows."""
        n_dropped = min(self._to_drop, len(tokens))
        self._to_drop -= n_dropped
        stream = np.concatenate([self._rest, tokens[n_dropped:]])
        n_windows = max(len(stream) - 1, 0) // self.seq_len
        for start in range(0, n_windows * self.seq_len, self.seq_len):
            self._windows.append(stream[start : start + self.seq_len + 1])
        self._rest = stream[n_windows * self.seq_len :]

    def _digest(self) -> str:
        return hashlib.sha256(b"".join(chunk.digest for chunk in self._chunks)).hexdigest()


def _check_state(state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    if state.get("format") != FORMAT:
        raise ValueError(f"state: got format {state.get('format')!r}; expected {FORMAT!r}")
    saved = state["settings"]
    problems = [
        f"{name}: got {value!r}; expected {saved.get(name)!r}, with which the state was saved"
        for name, value in settings.items()
        if saved.get(name) != value
    ]
    if problems:
        raise ConfigError(problems)


def _validate(seq_len: int, shuffle_buffer: int, epochs: int | None) -> Iterator[str]:
    if seq_len < 1:
        yield f"seq_len: got {seq_len}; expected at least 1"
    if shuffle_buffer < 0:
        yield f"shuffle_buffer: got {shuffle_buffer}; expected 0 (keeps the order) or more"
    if epochs is not None and epochs < 1:
        yield f"epochs: got {epochs}; expected at least 1, or None for an endless stream"
