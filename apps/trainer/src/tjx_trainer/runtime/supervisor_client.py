"""Connection of the trainer to its supervisor; without a supervisor nothing happens.

The trainer saves and stops when the supervisor dies, and sends it the reason of its own exit, since
the supervisor does not see the terminal output. Standard library only.
"""

import faulthandler
import os
import signal
import threading
from contextlib import suppress

# Two file descriptors, "ALIVE,REASON": a pipe that reaches its end when the supervisor dies, and a
# non-blocking pipe for the exit reason.
SUPERVISOR_VARIABLE = "TJX_SUPERVISOR"
MAX_REASON_BYTES = 4000  # less than a pipe holds

_words: int | None = None


def connect() -> None:
    """Take the file descriptors from the environment and watch the supervisor."""
    global _words
    if (given := os.environ.pop(SUPERVISOR_VARIABLE, None)) is None:
        return
    alive, words = (int(number) for number in given.split(","))
    for descriptor in (alive, words):  # child processes must not inherit them
        os.set_inheritable(descriptor, False)
    _words = words
    faulthandler.enable(words)  # reports crashes in native code
    threading.Thread(
        target=_stop_with_supervisor, args=(alive,), name="tjx-orphan", daemon=True
    ).start()


def send_exit_reason(text: str) -> None:
    """Send the supervisor the reason of this process's exit; a long text is cut to its end."""
    if _words is not None:
        with suppress(OSError):  # the supervisor may have died
            os.write(_words, text.encode("utf-8", "replace")[-MAX_REASON_BYTES:])


def _stop_with_supervisor(alive: int) -> None:
    """Send this process SIGTERM when the supervisor has died."""
    os.read(alive, 1)
    os.kill(os.getpid(), signal.SIGTERM)
