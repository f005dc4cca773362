"""Background prefetching of batches."""

import threading
from collections import deque
from collections.abc import Callable

_JOIN_TIMEOUT = 1.0  # seconds that `close` waits for a load in progress


class Prefetcher[T]:
    """Call ``load(step)`` for consecutive steps in a background thread.

    Call `close` when no more results are needed, or use it in a ``with`` statement.

    Parameters
    ----------
    load : Callable[[int], T]
        Called by one thread, in order of the steps. In a multi-process run it may transfer arrays
        to devices but must not launch computations: all processes must launch those in one order.
    first : int
        First step.
    stop : int, optional
        Step after the last one; None means no end.
    depth : int
        Most results in the queue. With 2, the next result is loaded while one waits.

    Raises
    ------
    ValueError
        If `depth` is less than 1.

    Examples
    --------
    >>> with Prefetcher(lambda step: step * step, first=3) as squares:
    ...     squares.get(3), squares.get(4)
    (9, 16)
    """

    def __init__(
        self, load: Callable[[int], T], *, first: int, stop: int | None = None, depth: int = 2
    ) -> None:
        if depth < 1:
            raise ValueError(f"depth: got {depth}; expected at least 1")
        self._load, self._stop, self._depth = load, stop, depth
        self._next = first  # the step that the next `get` must ask for
        self._ready: deque[T] = deque()
        self._error: BaseException | None = None  # raised after the results in the queue
        self._closed = False
        self._changed = threading.Condition()
        # A daemon thread does not keep the interpreter alive if `close` is never called.
        self._thread = threading.Thread(
            target=self._run, args=(first,), name="tjx-data-prefetch", daemon=True
        )
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait for the next result or an error; return whether `get` would return at once.

        Parameters
        ----------
        seconds : float
            Time limit.

        Returns
        -------
        bool
            False if the time ran out.
        """
        with self._changed:
            return self._changed.wait_for(self._has_answer, seconds)

    def get(self, step: int) -> T:
        """Return the result of ``load(step)``; steps must be requested in order, each once.

        Parameters
        ----------
        step : int
            The step after that of the previous call.

        Returns
        -------
        object
            What ``load(step)`` returned.

        Raises
        ------
        Exception
            The exception of ``load(step)``, with a note that names the step. Results of earlier
            steps are returned first; later calls raise the same exception.
        """
        assert step == self._next, f"step {step} requested, expected {self._next}"
        assert self._stop is None or step < self._stop, f"step {step} is beyond the last"
        with self._changed:
            assert not self._closed, "the Prefetcher is closed"
            self._changed.wait_for(self._has_answer)
            if not self._ready:
                assert self._error is not None
                raise self._error
            self._next += 1
            self._changed.notify_all()
            return self._ready.popleft()

    def close(self) -> None:
        """Stop the thread and discard the queue.

        A load in progress cannot be interrupted; its result is discarded. After one second `close`
        returns without waiting for it.
        """
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join(_JOIN_TIMEOUT)

    def __enter__(self) -> "Prefetcher[T]":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _has_answer(self) -> bool:
        return bool(self._ready) or self._error is not None

    def _run(self, first: int) -> None:
        step = first
        while step != self._stop and self._wait_for_room():
            try:
                self._load_one(step)
            except BaseException as error:  # `get` raises it in the thread of the caller
                error.add_note(f"while step {step} was loaded in the background")
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            step += 1

    def _wait_for_room(self) -> bool:
        """Wait until the queue has room; return False after `close`."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._ready) < self._depth)
            return not self._closed

    def _load_one(self, step: int) -> None:
        # A separate method, so that no local variable keeps the result alive after `get`.
        loaded = self._load(step)
        with self._changed:
            if not self._closed:
                self._ready.append(loaded)
                self._changed.notify_all()
