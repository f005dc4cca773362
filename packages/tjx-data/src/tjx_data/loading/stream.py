"""Batches from documents that cannot be indexed: read in order, with a state that is saved.

Names of array axes: B rows, T tokens in a row.
"""

import copy
import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tjx_data.corpora.documents import is_empty
from tjx_data.loading.base import Batch, validate_batching
from tjx_data.loading.samplers import permute_indices
from tjx_data.loading.stateless_rng import Words, derive_key
from tjx_data.loading.stream_source import CountingSource, StatefulSource, document_text
from tjx_data.prepared.tokenize_parts import token_dtype
from tjx_data.tokenization.tokenizer import Tokenizer

FORMAT = "tjx-data stream 1"
CHUNK_CHARACTERS = 1 << 17  # documents of about so many are tokenised together

Tokens = npt.NDArray[np.unsignedinteger]


class _Place(NamedTuple):
    """Where a chunk of documents begins."""

    source: dict[str, Any]
    epoch: int
    document: int  # of the epoch, over all processes
    token: int  # of this process's stream


class _Chunk(NamedTuple):
    place: _Place
    digest: bytes  # of its tokens


class StreamLoader:
    """Batches from documents that come in an order of their own, tokenised as they come.

    The stream is ``<end of text> document <end of text> document <end of text> ...`` as in a
    prepared set, cut into windows of `seq_len` tokens, each with its next tokens as labels; empty
    documents are skipped. With `shuffle_buffer`, each stretch of so many windows comes in an order
    drawn from (seed, number of the stretch). At the end of the documents, what fills no batch is
    dropped. What cannot be promised is in `promises`; a prepared set (`tjx_data.prepare`) promises
    all of it.

    Parameters
    ----------
    documents : Iterable
        Texts, or mappings with a text. With ``state_dict`` and ``load_state_dict``, as a streaming
        `datasets.IterableDataset` has them, a restored stream goes on where it was; anything else
        is read again from its beginning, so it must not be an iterator. A dataset is told by
        ``set_epoch`` which pass begins, for which it may have another order of its shards.
    tokenizer : Tokenizer
        Makes the tokens.
    seq_len : int
        Tokens in a row.
    batch_size : int
        Rows in a batch over all processes.
    process_index, process_count : int
        This process uses the documents process_index, process_index + process_count, ... and
        gives batch_size / process_count rows of each batch. Each process reads all documents: of
        many shards it is better to give each process its own (as
        `datasets.distributed.split_dataset_by_node` does), with its own batch size.
    shuffle_buffer : int
        Windows that are shuffled together; up to twice as many are in memory. 0 keeps the order.
    seed : int
        Decides the order, 0 to 2**64 - 1.
    epochs : int or None
        Passes over the documents; None is without end, as several processes need it: their
        documents do not give the same number of batches.
    field : str
        The name of the text where documents are mappings.

    Raises
    ------
    ValueError
        If a number is out of range, or `documents` can be read only once.
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
        problems += _wrong_numbers(seq_len, shuffle_buffer, epochs)
        if not isinstance(documents, StatefulSource) and iter(documents) is documents:
            problems.append(
                "documents is an iterator, which can be read only once; give something that can be "
                "read again, such as a list, Documents or a streaming dataset"
            )
        if problems:
            raise ValueError("\n".join(problems))
        if hasattr(documents, "select_columns"):  # a dataset: from its beginning, and only its text
            documents = documents.select_columns([field])
        self._source = (
            documents if isinstance(documents, StatefulSource) else CountingSource(documents)
        )
        self._tokenizer, self._dtype = tokenizer, token_dtype(tokenizer)
        self.seq_len, self.batch_size, self.seed = seq_len, batch_size, seed
        self.process_index, self.process_count = process_index, process_count
        self._stretch = max(shuffle_buffer, 1)
        self._epochs, self._field = epochs, field
        self._first_source = copy.deepcopy(self._source.state_dict())
        self._go_to(_Place(self._first_source, 0, 0, 0), row=0)

    @property
    def settings(self) -> dict[str, int | str | None]:
        """All that decides the batches beside the documents, by name."""
        return {
            "tokenizer": self._tokenizer.fingerprint,
            "seq_len": self.seq_len,
            "batch_size": self.batch_size,
            "process_index": self.process_index,
            "process_count": self.process_count,
            "shuffle_buffer": self._stretch,
            "seed": self.seed,
            "epochs": self._epochs,
            "field": self._field,
        }

    @property
    def guarantees(self) -> str:
        """What this stream can promise and what it cannot, in lines."""
        order = (
            f"shuffled within stretches of {self._stretch:,} rows, no further"
            if self._stretch > 1
            else "as they come; neighbours stay neighbours"
        )
        source = (
            "reading again all documents before its place"
            if isinstance(self._source, CountingSource)
            else "from where the documents' own state says"
        )
        return (
            f"A restored stream gives exactly the batches that would have come, {source}.\n"
            f"Order: {order}.\n"
            "It cannot promise:\n"
            "- any batch but the next: there is no access by step, and a state must be saved\n"
            "- to go on with another number of processes, another batch size or other settings\n"
            "- to go on if the documents changed (it is refused where it is noticed), or if "
            "something before it keeps documents back, such as a shuffle buffer of the dataset\n"
            "- that the batches do not depend on the number of processes"
        )

    def __str__(self) -> str:
        return f"StreamLoader at row {self._row:,}\n{self.guarantees}"

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
            At the end of the last pass, when there is no whole batch any more.
        ValueError
            If a document is no text, or there is none.
        """
        n_rows = self.batch_size // self.process_count
        rows = np.empty((n_rows, self.seq_len + 1), self._dtype)
        for i in range(n_rows):
            window = self._next_row()
            if window is None:
                raise EOFError(
                    f"the documents end after {self._row // n_rows} batches (epochs="
                    f"{self._epochs}); for more, give more epochs, or epochs=None for no end"
                )
            rows[i] = window
        windows_BT = rows.astype(np.int32)
        return {"tokens": windows_BT[:, :-1], "labels": windows_BT[:, 1:]}

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs to go on after the batch that was given last.

        It is small and can be written as JSON: the place of the documents whose tokens are still
        in use, how often documents were read since, and a hash of their tokens. Where batches are
        loaded ahead, take it together with the batch: ``(stream.next_batch(), stream.state())``.

        Raises
        ------
        ValueError
            If the state of the documents cannot be written as JSON.
        """
        place = self._chunks[0].place if self._chunks else self._place
        try:
            source = json.loads(json.dumps(place.source))
        except TypeError as error:
            raise ValueError(f"documents.state_dict() is not made of JSON: {error}") from error
        return {
            "format": FORMAT,
            "settings": self.settings,
            "row": self._row,
            "place": {**place._asdict(), "source": source},
            "chunks": len(self._chunks),
            "sha256": self._digest(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken: the next batch is the one that came after it.

        Raises
        ------
        ValueError
            If the state is of another format or of other settings, saying which, or the documents
            are no longer the same.
        """
        _check_state(state, self.settings)
        self._go_to(_Place(**copy.deepcopy(state["place"])), row=state["row"])
        while len(self._chunks) < state["chunks"] and not self._ended:
            self._read_chunk()
        if self._digest() != state["sha256"]:
            raise ValueError(
                "the documents at the place of this state are not those that were there when it "
                "was saved: put back what they were, or begin a new stream. (A dataset that "
                "shuffles with a buffer, or a source that is read in another order each time, "
                "cannot be restored: shuffle with shuffle_buffer instead.)"
            )

    def _go_to(self, place: _Place, *, row: int) -> None:
        """Have nothing in memory, at a row whose stretch of windows begins at or after a place."""
        self._reading: Iterator[Any] | None = None
        self._place, self._row = place, row  # of the next chunk; of the next row
        self._chunks: deque[_Chunk] = deque()  # those with tokens that are still in use
        self._first_window = row - row % self._stretch
        self._windows: deque[Tokens] = deque()  # [T + 1] each, from the first of the stretch on
        self._order: Words | None = None  # of the stretch
        self._left = np.empty(0, self._dtype)  # tokens that fill no window yet
        self._to_drop = self._first_window * self.seq_len - place.token
        self._found_text = place.document > 0  # in this pass
        self._ended = False

    def _next_row(self) -> Tokens | None:
        """Return the next row in its shuffled order, or None at the end."""
        stretch, within = divmod(self._row, self._stretch)
        # One window is read for each row given, so that no batch waits for a whole stretch.
        wanted = within + self._stretch
        while len(self._windows) < wanted and not self._ended:
            self._read_chunk()
        if within == 0 or self._order is None:  # all of the stretch is here, or all there is
            size = min(self._stretch, len(self._windows))
            numbers = np.arange(size, dtype=np.uint64)
            self._order = (
                permute_indices(numbers, size, derive_key(self.seed, stretch)) if size else numbers
            )
        if within >= len(self._order):
            return None
        window = self._windows[int(self._order[within])]
        self._row += 1
        if self._row % self._stretch == 0:
            self._forget_stretch()
        return window

    def _forget_stretch(self) -> None:
        """Let go of the windows that were given, and of the places that nobody needs any more."""
        for _ in range(self._stretch):
            self._windows.popleft()
        self._first_window = self._row
        while self._chunks:
            after = self._chunks[1].place if len(self._chunks) > 1 else self._place
            if after.token > self._first_window * self.seq_len:
                break
            self._chunks.popleft()

    def _read_chunk(self) -> None:
        """Read and tokenise some documents, or find that there are no more."""
        place = self._place
        texts, after = self._read_texts(place)
        if texts:
            tokens = self._tokenize(texts, is_first=place.token == 0)
            self._chunks.append(_Chunk(place, hashlib.sha256(tokens.tobytes()).digest()))
            after = after._replace(token=place.token + len(tokens))
            self._add(tokens)
        self._place = after

    def _read_texts(self, place: _Place) -> tuple[list[str], _Place]:
        """Read this process's next documents of a pass, and return the place after them."""
        if self._reading is None:
            if hasattr(self._source, "set_epoch"):
                self._source.set_epoch(place.epoch)
            self._source.load_state_dict(copy.deepcopy(place.source))
            self._reading = iter(self._source)
        texts: list[str] = []
        n_characters, number = 0, place.document
        for number, document in enumerate(self._reading, start=place.document + 1):
            if (number - 1) % self.process_count != self.process_index:
                continue
            text = document_text(document, number, self._field)
            if not is_empty(text):
                texts.append(text)
                n_characters += len(text)
                self._found_text = True
            if n_characters >= CHUNK_CHARACTERS:
                source = copy.deepcopy(self._source.state_dict())
                return texts, place._replace(source=source, document=number)
        if not self._found_text:
            raise ValueError(
                f"process {self.process_index} of {self.process_count} found no text in a pass "
                f"over {number} documents; a stream needs documents for each process"
            )
        self._reading, self._found_text = None, False
        self._ended = place.epoch + 1 == self._epochs
        return texts, _Place(self._first_source, place.epoch + 1, 0, place.token)

    def _tokenize(self, texts: list[str], *, is_first: bool) -> Tokens:
        eot = [] if self._tokenizer.eot_id is None else [self._tokenizer.eot_id]
        parts = [eot] if is_first else []
        for ids in self._tokenizer.encode_batch(texts):
            parts += [ids, eot]
        return np.concatenate([np.array(part, self._dtype) for part in parts])

    def _add(self, tokens: Tokens) -> None:
        """Cut what has been read into windows."""
        n_dropped = min(self._to_drop, len(tokens))
        self._to_drop -= n_dropped
        stream = np.concatenate([self._left, tokens[n_dropped:]])
        n_windows = max(len(stream) - 1, 0) // self.seq_len
        for start in range(0, n_windows * self.seq_len, self.seq_len):
            self._windows.append(stream[start : start + self.seq_len + 1])
        self._left = stream[n_windows * self.seq_len :]

    def _digest(self) -> str:
        return hashlib.sha256(b"".join(chunk.digest for chunk in self._chunks)).hexdigest()


def _check_state(state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    if state.get("format") != FORMAT:
        raise ValueError(
            f"the state is of format {state.get('format')!r}; this version reads {FORMAT!r}"
        )
    saved = state["settings"]
    problems = [
        f"{name}: the state was saved with {saved.get(name)!r}, this stream has {value!r}"
        for name, value in settings.items()
        if saved.get(name) != value
    ]
    if problems:
        raise ValueError("\n".join([*problems, "make the stream with the settings of the state"]))


def _wrong_numbers(seq_len: int, shuffle_buffer: int, epochs: int | None) -> Iterator[str]:
    if seq_len < 1:
        yield f"seq_len={seq_len}: a row needs at least 1 token"
    if shuffle_buffer < 0:
        yield f"shuffle_buffer={shuffle_buffer}: choose 0 for the order of the documents, or more"
    if epochs is not None and epochs < 1:
        yield f"epochs={epochs}: choose 1 or more passes, or None for no end"
