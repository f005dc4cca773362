"""Signal handling: finish and save before stopping, or save on request."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal(BaseException):
    """A stop signal arrived while there was nothing to save.

    Attributes
    ----------
    signal : int
        Its number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


class SignalHandler:
    """Record SIGINT, SIGTERM and SIGUSR1 for the training loop; a context manager.

    SIGINT and SIGTERM request a stop, SIGUSR1 requests a save. Repeated signals change nothing, so
    a save is never cut short, except for a second SIGINT, which ends the program at once, and a
    third, which kills it.

    Attributes
    ----------
    stop : int
        The first stop signal; 0 without one.
    """

    def __init__(self) -> None:
        self.stop = 0
        self._save = False
        self._interrupted = False
        self._interruptible = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "SignalHandler":
        for number in (*STOP_SIGNALS, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            # None stands for a handler in C, which cannot be restored from Python.
            restored = signal.SIG_DFL if handler is None else handler
            signal.signal(number, restored)  # type: ignore[arg-type]  # as signal() returned it

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise `StopSignal` in the block at a stop signal, or at once after an earlier one.

        For work that need not be saved: data preparation, restoring, sampling. With several
        processes nothing is raised, because the others would wait for this one.

        Raises
        ------
        StopSignal
            The signal.
        """
        self._interruptible = jax.process_count() == 1
        try:
            self._raise_if_interruptible()
            yield
        finally:
            self._interruptible = False

    def pop_save_request(self) -> bool:
        """Return whether a save was requested since the last call."""
        save, self._save = self._save, False
        return save

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self._save = True
            return
        if number == signal.SIGINT and self._interrupted:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        self.stop = self.stop or number
        self._raise_if_interruptible()

    def _raise_if_interruptible(self) -> None:
        if self._interruptible and self.stop:
            self._interruptible = False  # do not interrupt the cleanup
            raise StopSignal(self.stop)
