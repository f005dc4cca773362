"""What a trainer does for the supervisor that started it; nothing where there is none.

It ends, saving, when the supervisor is gone, and leaves word of why it ends: of what is written
to the terminal the supervisor sees nothing. Standard library only.
"""

import faulthandler
import os
import signal
import threading
from contextlib import suppress

# Two file descriptors, "ALIVE,WORDS": a pipe that is at its end when the supervisor is gone, and
# one for last words, which never blocks whoever writes to it.
SUPERVISOR_VARIABLE = "TJX_SUPERVISOR"
MAX_REASON_BYTES = 4000  # bytes; a pipe holds more

_words: int | None = None


def connect() -> None:
    """Take what the supervisor has handed over."""
    global _words
    if (given := os.environ.pop(SUPERVISOR_VARIABLE, None)) is None:
        return
    alive, words = (int(number) for number in given.split(","))
    for descriptor in (alive, words):  # programs that we start have nothing to do with it
        os.set_inheritable(descriptor, False)
    _words = words
    faulthandler.enable(words)  # a crash in native code leaves word too
    threading.Thread(target=_wait_for_end, args=(alive,), name="tjx-orphan", daemon=True).start()


def send_exit_reason(text: str) -> None:
    """Tell the supervisor why this process ends; of a long text, such as a traceback, the end."""
    if _words is not None:
        with suppress(OSError):  # it may be gone
            os.write(_words, text.encode("utf-8", "replace")[-MAX_REASON_BYTES:])


def _wait_for_end(alive: int) -> None:
    """Ask this process to stop when the supervisor was killed and could pass nothing on."""
    os.read(alive, 1)
    os.kill(os.getpid(), signal.SIGTERM)
