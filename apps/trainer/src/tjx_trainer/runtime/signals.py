"""Signals that ask a run to stop or to save: what is under way is finished and saved first."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal(BaseException):
    """A signal that asks to stop came while there was nothing to save.

    Attributes
    ----------
    signal : int
        Its number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


class SignalHandler:
    """Remembers SIGINT, SIGTERM and SIGUSR1 instead of dying of them; a context manager.

    SIGINT and SIGTERM ask the run to stop, SIGUSR1 to save and go on. More of them change nothing,
    so that a save is never cut short by impatience, but for a second SIGINT: it ends the program at
    once, for a person who does not want to wait. A third SIGINT kills it.

    Attributes
    ----------
    stop : int
        The first signal that asked to stop; 0 where none came.
    """

    def __init__(self) -> None:
        self.stop = 0
        self._save = False
        self._interrupted = False
        self._at_once = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "SignalHandler":
        for number in (*STOP_SIGNALS, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            # None stands for a handler that is not Python's, which cannot be put back.
            given = signal.SIG_DFL if handler is None else handler
            signal.signal(number, given)  # type: ignore[arg-type]  # what signal() gave us

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise `Stopped` in here as soon as a signal asks to stop, or where one has already.

        For what is not to be saved: data that are prepared, a state that is read, a sample. One of
        several processes does not leave alone, as the others would wait for it: it goes on.

        Raises
        ------
        Stopped
            The signal.
        """
        self._at_once = jax.process_count() == 1
        try:
            self._leave_if_asked()
            yield
        finally:
            self._at_once = False

    def pop_save_request(self) -> bool:
        """Tell whether a save was asked for since this was last called."""
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
        self._leave_if_asked()

    def _leave_if_asked(self) -> None:
        if self._at_once and self.stop:
            self._at_once = False  # what is cleaned up on the way out is not cut short
            raise StopSignal(self.stop)
