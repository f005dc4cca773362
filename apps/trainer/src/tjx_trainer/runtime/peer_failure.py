"""Message to the user when another process of a distributed run fails.

JAX then aborts this process in native code, where no Python handler or ``finally`` runs. A small
child process therefore waits for the end of this one and prints the message.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import jax

# Reads one byte, written after a clean exit, or the end of the pipe after a crash. Signals for the
# run must not end it first.
_REPORTER = """
import signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)
sys.stdin.buffer.read(1) or sys.stderr.write(sys.argv[1])
"""


@contextmanager
def report_peer_failure(run_dir: str | None) -> Iterator[None]:
    """Print how to resume if this process of a distributed run dies inside the block.

    The message is printed after this process has ended, and after errors of JAX, which is how a
    lost peer appears in the other processes. Other errors explain themselves.

    Parameters
    ----------
    run_dir : str or None
        The run directory as given by the user.
    """
    if jax.process_count() == 1:
        yield
        return
    text = (
        f"process {jax.process_index()} of {jax.process_count()} ended before the run did. When "
        "one process fails, JAX ends the others: the log of the first to fail shows the cause. "
        "Saved checkpoints are valid. To resume from the newest, start all processes again with "
        f"--run_dir {run_dir} and the same flags (--mesh.* may change with the devices)\n"
    )
    output, pipe = os.pipe()
    reporter = subprocess.Popen(
        (sys.executable, "-I", "-S", "-c", _REPORTER, text),
        stdin=output,
        stdout=subprocess.DEVNULL,
        process_group=0,
    )
    os.close(output)
    try:
        yield
    except jax.errors.JaxRuntimeError:
        raise  # the pipe stays open until this process ends
    except BaseException:
        _dismiss(reporter, pipe)
        raise
    _dismiss(reporter, pipe)


def _dismiss(reporter: subprocess.Popen[bytes], pipe: int) -> None:
    with suppress(OSError):  # the child was killed
        os.write(pipe, b".")
    os.close(pipe)
    reporter.wait()
