"""Loader of rows from a stream of documents, tokenized on access: a function of the row index.

The state of the stream is recorded in an index file now and then, so that a resumed run continues
near its row instead of reading all documents before it. The index only saves time: without it the
rows are the same.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tjx_core import ConfigError, write_atomically
from tjx_data.bounded_io import read_json_object
from tjx_data.cache import default_cache_dir
from tjx_data.config import DataConfig
from tjx_data.corpora.documents import Documents, Holdout, assign_split
from tjx_data.errors import DataError
from tjx_data.loading.base import Batch, Loader, RowIndices
from tjx_data.loading.document_stream import DocumentSource
from tjx_data.loading.mixture import MixtureLoader
from tjx_data.loading.stream import StreamLoader
from tjx_data.prepared.dataset_cache import open_training_documents
from tjx_data.tokenization.tokenizer import Tokenizer

SAVE_SECONDS = 5.0
"""Least time between two recorded states."""
MAX_STATES = 256
"""Recorded states; when there are more, every second one of the older half is dropped."""
_MAX_INDEX_BYTES = 4 << 20
_SLICE_ROWS = 1024

_log = logging.getLogger(__name__)


class StreamRows(Loader):
    """Rows of an endless stream of documents, as of `StreamLoader`, by their index.

    Rows in ascending order are read once; going back or far ahead restores the nearest recorded
    state before them and reads from there. With several processes each one reads its own documents
    and numbers its own rows, so that ``batch_size`` is that of this process, and batches depend on
    the number of processes.

    Parameters
    ----------
    documents : DocumentSource
        The documents of all processes.
    tokenizer : Tokenizer
        Encodes them.
    source : Mapping[str, str]
        Description of the documents, part of the identity.
    seq_len : int
        Tokens per row.
    batch_size : int
        Rows in a batch of this process.
    seed : int
        Seed of the order.
    process_index, process_count : int
        This process uses the documents process_index, process_index + process_count, ...
    shuffle_buffer : int
        Windows that are shuffled together.
    index_dir : Path
        Folder of index files.

    Raises
    ------
    ValueError
        If an argument is invalid.
    """

    def __init__(
        self,
        documents: DocumentSource,
        tokenizer: Tokenizer,
        *,
        source: Mapping[str, str],
        seq_len: int,
        batch_size: int,
        seed: int,
        process_index: int,
        process_count: int,
        shuffle_buffer: int,
        index_dir: Path,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed)
        self.source, self.seq_len = documents, seq_len
        self._stream = StreamLoader(
            documents,
            tokenizer,
            seq_len=seq_len,
            batch_size=process_count,  # unused: rows are read one by one
            process_index=process_index,
            process_count=process_count,
            shuffle_buffer=shuffle_buffer,
            seed=seed,
            epochs=None,
        )
        self._identity = {
            **{f"source/{name}": value for name, value in source.items()},
            "tokenizer": tokenizer.fingerprint,
            "stream": f"of {process_count} processes, shuffle_buffer {shuffle_buffer}",
            "seq_len": str(seq_len),
            "seed": str(seed),
        }
        key = json.dumps([self._identity, process_index], sort_keys=True).encode()
        self._index = _StateIndex(index_dir / f"{hashlib.sha256(key).hexdigest()[:32]}.json")

    @property
    def identity(self) -> Mapping[str, str]:
        """Description of documents, tokenizer and order."""
        return self._identity

    def rows(self, row_indices: RowIndices) -> Batch:
        """Return rows of this process by index.

        Parameters
        ----------
        row_indices : int64 [R], ascending
            Indices of this process's rows.

        Returns
        -------
        dict
            ``tokens`` and ``labels``, int32 [R, seq_len].

        Raises
        ------
        DataError
            If the documents changed since a state was recorded, or reading fails after all retries.
        """
        windows = np.empty((len(row_indices), self.seq_len + 1), np.int32)
        for i, row in enumerate(row_indices.tolist()):
            if row != self._stream.row:
                self._seek(row)
            windows[i] = self._stream.next_rows(1)[0]
        self._index.record(self._stream)
        return {"tokens": windows[:, :-1], "labels": windows[:, 1:]}

    def evaluation_batches(self, limit: int | None = None) -> Iterator[Batch]:
        """Raise ValueError: a stream has no end; evaluate on a prepared set."""
        raise ValueError(
            f"evaluation_batches: got a stream (limit={limit}); expected a prepared validation set"
        )

    def _seek(self, row: int) -> None:
        """Continue at a row."""
        known, state = self._index.nearest(row)
        if not known <= self._stream.row <= row:
            if state is None:
                self._stream.restart()
            else:
                try:
                    self._stream.restore(state)
                except ValueError as error:
                    raise DataError(
                        f"stream of {self._identity.get('source/corpus', 'files')}: the documents "
                        f"before row {known} changed since this run read them, or their order did: "
                        "restore them, or start a new run"
                    ) from error
        if row - self._stream.row > _SLICE_ROWS:
            _log.warning("stream: reading %d rows again to resume", row - self._stream.row)
        while (missing := row - self._stream.row) > 0:
            self._stream.next_rows(min(missing, _SLICE_ROWS))
            self._index.record(self._stream)


class _StateIndex:
    """States of a stream by row, kept in a file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._states: dict[int, dict[str, Any]] = self._load()
        self._last = time.monotonic()

    def nearest(self, row: int) -> tuple[int, dict[str, Any] | None]:
        """Return the last recorded state at or before a row; row 0 and None without one."""
        known = max((found for found in self._states if found <= row), default=0)
        return known, self._states.get(known)

    def record(self, stream: StreamLoader) -> None:
        """Record the state of a stream, if the last record is old enough."""
        if time.monotonic() - self._last < SAVE_SECONDS or stream.row in self._states:
            return
        self._last = time.monotonic()
        self._states[stream.row] = stream.state()
        rows = sorted(self._states)
        if len(rows) > MAX_STATES:
            for old in rows[: MAX_STATES // 2 : 2]:
                del self._states[old]
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            states = [[row, self._states[row]] for row in sorted(self._states)]
            write_atomically(self._file, json.dumps({"states": states}))
        except OSError as error:
            _log.warning("%s: cannot record the state of a stream: %s", self._file, error.strerror)

    def _load(self) -> dict[int, dict[str, Any]]:
        try:
            content = read_json_object(self._file, _MAX_INDEX_BYTES)
            return {int(row): dict(state) for row, state in content["states"]}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, LookupError, TypeError) as error:
            _log.warning("%s: damaged (%s); the stream is read from its start", self._file, error)
            return {}


def open_stream(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> StreamRows | MixtureLoader:
    """Open the training documents of a config as a stream of rows, tokenized on access.

    Held-out documents are left out, so that the validation split of a prepared set of the same
    config is unseen.

    Parameters
    ----------
    config : DataConfig
        One corpus, or a mixture, whose weights and curriculum hold for each process.
    tokenizer : Tokenizer
        Encodes the documents.
    batch_size : int
        Rows in a batch over all processes.
    seed : int
        Seed of the order.
    process_index, process_count : int
        Each process reads its own documents, and ``batch_size / process_count`` rows of a batch.

    Returns
    -------
    StreamRows or MixtureLoader
        A loader; of a mixture, one `StreamRows` for each corpus.

    Raises
    ------
    HubError
        If a corpus is neither in the cache nor reachable.
    ValueError
        If a corpus or an argument is unusable.
    """
    if batch_size % process_count:
        message = f"batch_size: got {batch_size}; expected a multiple of {process_count} processes"
        raise ConfigError([message])
    rows = batch_size // process_count
    index_dir = Path(config.cache_dir or default_cache_dir()).expanduser() / "streams"
    loaders = {}
    for name, (documents, holdout, fraction) in open_training_documents(config).items():
        keep = partial(_is_training, holdout, fraction)
        loaders[name] = StreamRows(
            DocumentSource(documents, name, keep=keep, strict=config.strict),
            tokenizer,
            source=_description(documents, holdout, fraction),
            seq_len=config.seq_len,
            batch_size=rows,
            seed=seed,
            process_index=process_index,
            process_count=process_count,
            shuffle_buffer=config.shuffle_buffer,
            index_dir=index_dir,
        )
    if config.mixture is None:
        return next(iter(loaders.values()))
    by_step = config.weights_by_step
    return MixtureLoader(loaders, by_step.pop(0), changes=by_step, batch_size=rows)


def _is_training(holdout: Holdout, holdout_fraction: float, text: str) -> bool:
    return holdout == "official" or assign_split(text, holdout_fraction) == "train"


def _description(documents: Documents, holdout: Holdout, holdout_fraction: float) -> dict[str, str]:
    """Return the values that determine the training documents; the folder of files does not."""
    source = {key: value for key, value in documents.source.items() if key != "path"}
    fraction = "" if holdout == "official" else f" {holdout_fraction}"
    return {**source, "holdout": f"{holdout}{fraction}"}
