"""Loading ahead of use, in a thread of its own."""

import threading
import time
from collections import deque
from collections.abc import Callable

_PATIENCE = 1.0  # seconds that `close` gives a load under way to end


class Prefetcher[T]:
    """Calls ``load(step)`` for one step after another in the background, ahead of their use.

    Close it when no more is wanted, or use it in a ``with`` statement.

    Parameters
    ----------
    load : Callable[[int], T]
        Called by one thread, in order. Where several processes share the devices it puts arrays
        there and computes nothing on them: all processes must launch computations in one order.
    first : int
        The step to begin with.
    stop : int, optional
        The step after the last one; None has no end.
    depth : int
        Results that may lie ready: with 2, one waits while the next is made.

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
            raise ValueError(f"depth={depth}: choose at least 1, the result that is made ahead")
        self._load, self._stop, self._depth = load, stop, depth
        self._next = first  # the step that `get` is asked for next
        self._ready: deque[T] = deque()
        self._error: BaseException | None = None  # of the step after those that lie ready
        self._closed = False
        self._changed = threading.Condition()
        self._waited = 0.0
        # A daemon does not keep the interpreter alive where nobody closes it.
        self._thread = threading.Thread(
            target=self._run, args=(first,), name="tjx-data-prefetch", daemon=True
        )
        self._thread.start()

    def get(self, step: int) -> T:
        """Return what ``load(step)`` gave; steps are asked for in order, each once.

        Raises
        ------
        Exception
            Whatever ``load(step)`` raised, with a note that names the step. Results of the steps
            before are given first; afterwards the same error comes again.
        """
        assert step == self._next, f"step {step} was asked for where {self._next} comes"
        assert self._stop is None or step < self._stop, f"step {step} is beyond the last"
        begin = time.perf_counter()
        with self._changed:
            assert not self._closed, "a closed Prefetcher was asked for a step"
            self._changed.wait_for(lambda: self._ready or self._error is not None)
            self._waited += time.perf_counter() - begin
            if not self._ready:
                assert self._error is not None
                raise self._error
            self._next += 1
            self._changed.notify_all()
            return self._ready.popleft()

    @property
    def waited_seconds(self) -> float:
        """Seconds that `get` has waited since they were last taken."""
        return self._waited

    def pop_waited_seconds(self) -> float:
        """Return `waited_seconds` and count from 0 again."""
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self) -> None:
        """End the thread and let go of what lies ready. A load under way cannot be interrupted.

        Its result is dropped; if it takes longer than a second, it is not waited for.
        """
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join(_PATIENCE)

    def __enter__(self) -> "Prefetcher[T]":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self, first: int) -> None:
        step = first
        while step != self._stop and self._has_room():
            try:
                self._load_one(step)
            except BaseException as error:  # whatever it is, it belongs to whoever asks for it
                error.add_note(f"while step {step} was loaded in the background")
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            step += 1

    def _has_room(self) -> bool:
        """Wait until a result may be made; False when none is wanted any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._ready) < self._depth)
            return not self._closed

    def _load_one(self, step: int) -> None:
        # No name outlives this call: what was handed over is kept alive by its user alone.
        loaded = self._load(step)
        with self._changed:
            if not self._closed:
                self._ready.append(loaded)
                self._changed.notify_all()
