"""Documents of a corpus as the source of a stream: resumable, with retries."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tjx_data.corpora.documents import Documents
from tjx_data.errors import DataError

RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0)
"""Waits before the attempts to continue after a connection or disk error."""
SLOW_SECONDS = 30.0
"""A wait for the next documents that is longer is logged while it lasts."""

_log = logging.getLogger(__name__)


class DocumentSource:
    """The documents of a corpus, optionally filtered by a condition, with a saved position.

    The position is the number of the part and of the document in it. Parts before it are skipped
    without reading, if the corpus consists of files; a dataset of the hub is read again.

    After an `OSError` (a `HubError` is one) the source waits, opens the corpus again and continues
    behind the last document, so that none is lost or repeated.

    Parameters
    ----------
    documents : Documents
        The corpus.
    name : str
        Name in messages.
    keep : callable
        Whether a document belongs to the stream.
    strict : bool
        Whether a malformed record is an error; otherwise it is skipped.

    Attributes
    ----------
    status : str
        ``reading``, ``slow`` (no document for `SLOW_SECONDS`), ``retrying`` or ``failed``.
    """

    def __init__(
        self, documents: Documents, name: str, *, keep: Callable[[str], bool], strict: bool = False
    ) -> None:
        self._documents, self._name = documents, name
        self._keep, self._strict = keep, strict
        self._part = self._document = 0
        self.status = "reading"
        self._is_awaited = False  # by the consumer; False while it uses a document

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last document."""
        return {"part": self._part, "document": self._document}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Start the next iteration at a position."""
        self._part, self._document = state_dict["part"], state_dict["document"]

    def __iter__(self) -> Iterator[str]:
        attempt = 0
        while True:
            before = self._part, self._document
            try:
                yield from self._read()
            except OSError as error:
                attempt = 0 if (self._part, self._document) != before else attempt
                self._wait(attempt, error)
                attempt += 1
            else:
                return

    def _read(self) -> Iterator[str]:
        first, skipped = self._part, self._document
        self._is_awaited = True
        with self._logging_slowness() as beat:
            for number, part in enumerate(self._documents.parts()):
                if number < first:
                    continue
                for index, document in enumerate(part.read(), 1):
                    if number == first and index <= skipped:
                        continue
                    beat()
                    self._part, self._document = number, index
                    if isinstance(document, str):
                        if self._keep(document):
                            self._is_awaited = False
                            yield document
                            self._is_awaited = True
                            beat()
                    elif self._strict:
                        raise ValueError(
                            f"{document.file}, line {document.line}: {document.reason}"
                        )
                beat()

    def _wait(self, attempt: int, error: OSError) -> None:
        if attempt == len(RETRY_SECONDS):
            self.status = "failed"
            raise DataError(
                f"stream of {self._name}: reading failed {attempt + 1} times, the last time with: "
                f"{error}; start again when the source is available: the run continues there"
            ) from error
        self.status, seconds = "retrying", RETRY_SECONDS[attempt]
        _log.warning(
            "stream of %s: %s; retry %d of %d in %g s",
            self._name, error, attempt + 1, len(RETRY_SECONDS), seconds,
        )  # fmt: skip
        time.sleep(seconds)

    @contextmanager
    def _logging_slowness(self) -> Iterator[Callable[[], None]]:
        """Log if no document arrives for a while; yield a function to call after each."""
        last, ended = time.monotonic(), threading.Event()

        def beat() -> None:
            nonlocal last
            last = time.monotonic()
            self.status = "reading"

        def watch() -> None:
            while not ended.wait(SLOW_SECONDS / 2):
                seconds = time.monotonic() - last
                if seconds > SLOW_SECONDS and self._is_awaited:
                    self.status = "slow"
                    _log.warning("stream of %s: no document for %.0f s", self._name, seconds)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield beat
        finally:
            ended.set()
            thread.join()
