"""What to do when a process of several is lost, said when JAX ends the others from within.

Nothing of Python runs then, neither handlers nor `finally`: JAX aborts the process in native code.
So a small process that knows what to say waits for the end of this one.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import jax

# Reads the one byte that says "all is well", or the end of the pipe, which is our death. A signal
# that is meant for the run must not end it first.
_WITNESS = """
import signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)
sys.stdin.buffer.read(1) or sys.stderr.write(sys.argv[1])
"""

# Witnesses of processes that are about to end: a pipe that nobody holds would close at once.
_waiting: list[subprocess.Popen[bytes]] = []


@contextmanager
def report_peer_failure(run_dir: str | None) -> Iterator[None]:
    """Have it said on standard error how to go on, if this process of several dies in the block.

    It is said when this process is gone, however it ends, also after an error of JAX, which is what
    a lost process looks like from the others. Other errors say themselves what to do.

    Parameters
    ----------
    run_dir : str or None
        The run directory, as the user wrote it.
    """
    if jax.process_count() == 1:
        yield
        return
    text = (
        f"process {jax.process_index()} of {jax.process_count()} ended before the run did. When "
        "one is lost, JAX ends the others: the log of the first to fail says why. What was saved "
        "is sound; to go on from the newest checkpoint, start all processes again with "
        f"--run_dir {run_dir} and the same flags (fewer or more devices may be other --mesh.*)\n"
    )
    witness = subprocess.Popen(
        (sys.executable, "-I", "-S", "-c", _WITNESS, text),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        process_group=0,
    )
    try:
        yield
    except jax.errors.JaxRuntimeError:
        _waiting.append(witness)
        raise
    except BaseException:
        _dismiss(witness)
        raise
    _dismiss(witness)


def _dismiss(witness: subprocess.Popen[bytes]) -> None:
    assert witness.stdin is not None
    with suppress(OSError):  # somebody has killed it
        witness.stdin.write(b".")
        witness.stdin.close()
    witness.wait()
