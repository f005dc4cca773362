"""Signals that ask a run to stop: the step under way is finished and saved first."""

import signal
from types import FrameType


class StopRequest:
    """Remembers SIGINT and SIGTERM instead of dying of them; a context manager.

    The second SIGINT ends the program at once, for a person who does not want to wait.

    Attributes
    ----------
    signal : int or None
        The first signal that came.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal() gave us

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells count; 0 where none came."""
        return 0 if self.signal is None else 128 + self.signal

    def __call__(self) -> bool:
        """Tell whether to stop."""
        return self.signal is not None

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = self.signal or number
