"""Verifiers that run programs: a child process with limits, without network, killed as a group.

`launcher` sets the limits and starts the program. On Linux, `unshare` (util-linux) gives it network
and process namespaces of its own: it has no network, and all its processes end with it. The file
system is readable: do not run programs of untrusted models beside secrets.
"""

import contextlib
import functools
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tjx_rl.verifiers import launcher


class SandboxError(Exception):
    """A program that exceeded a limit or could not be started."""


class Limits(NamedTuple):
    """Limits of a program.

    Attributes
    ----------
    seconds : float
        Wall time; the CPU time has the same limit, rounded up.
    memory : int
        Address space [bytes].
    output : int
        Standard output and error together, and the size of any file [bytes].
    """

    seconds: float = 5.0
    memory: int = 1 << 30
    output: int = 1 << 16


DEFAULT_LIMITS = Limits()


class Finished(NamedTuple):
    """Exit code and output of a program."""

    code: int
    output: str


@functools.cache
def isolation_command() -> tuple[str, ...]:
    """Return the command that isolates network and processes; empty where it does not work."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return ()
    command = (unshare, "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")
    tried = subprocess.run(
        [*command, sys.executable, "-I", "-S", "-c", ""], capture_output=True, check=False
    )
    return command if tried.returncode == 0 else ()


def run_program(
    source: str, limits: Limits = DEFAULT_LIMITS, *, allow_network: bool | None = None
) -> Finished:
    """Run a Python program with the standard library only.

    Parameters
    ----------
    source : str
        The program.
    limits : Limits
        Time, memory and output.
    allow_network : bool, optional
        Whether the program may use the network. By default the environment variable
        TJX_VERIFIER_NETWORK decides: 1 allows it, for systems without namespaces.

    Returns
    -------
    Finished
        Exit code and output.

    Raises
    ------
    SandboxError
        If the program exceeds the wall time or the output limit, or the network cannot be isolated.
    """
    if allow_network is None:
        allow_network = os.environ.get("TJX_VERIFIER_NETWORK") == "1"
    isolation = () if allow_network else isolation_command()
    if not (allow_network or isolation):
        raise SandboxError(
            "network: got a system without `unshare`; expected Linux namespaces; set "
            "TJX_VERIFIER_NETWORK=1 to run programs with network"
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "program.py")
        file.write_text(source, encoding="utf-8", errors="surrogatepass")
        numbers = (int(limits.seconds) + 1, limits.memory, limits.output)
        words = [
            *isolation,
            sys.executable,
            "-I",
            "-S",
            launcher.__file__,
            *map(str, numbers),
            str(file),
        ]
        with subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            cwd=folder, env={"PATH": os.defpath}, start_new_session=True,
        ) as child:  # fmt: skip
            try:
                output = _read(child, limits)
                remaining = max(limits.seconds, 0.1)
                return Finished(child.wait(remaining), output.decode("utf-8", "replace"))
            except subprocess.TimeoutExpired:
                raise SandboxError(f"time limit of {limits.seconds:g} s") from None
            finally:
                _kill_group(child.pid)


def _read(child: "subprocess.Popen[bytes]", limits: Limits) -> bytes:
    """Read the output until the program closes it."""
    assert child.stdout is not None
    end = time.monotonic() + limits.seconds
    output = b""
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, end - time.monotonic())):
                raise SandboxError(f"time limit of {limits.seconds:g} s")
            data = os.read(child.stdout.fileno(), 1 << 16)
            output += data
            if not data:
                return output
            if len(output) > limits.output:
                raise SandboxError(f"output limit of {limits.output} bytes")


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(group, signal.SIGKILL)


def passes_tests(response: str, tests: str, limits: Limits = DEFAULT_LIMITS) -> bool:
    """Return whether a program passes the tests that are run after it, such as assertions.

    The end of the tests prints a random token, so that a program which exits early fails. A program
    that searches for the token in its own process can still forge it.

    Parameters
    ----------
    response : str
        Python source.
    tests : str
        Python source that raises an exception for a wrong program.
    limits : Limits
        As for `run_program`.

    Raises
    ------
    SandboxError
        As `run_program`.
    """
    token = secrets.token_hex(16)
    finished = run_program(f"{response}\n\n{tests}\n\nprint({token!r})\n", limits)
    return finished.code == 0 and finished.output.rstrip().endswith(token)


def regex_matches(response: str, pattern: str) -> bool:
    """Return whether a pattern matches all of a response, without surrounding white space.

    The search runs in a process of its own, since a pattern can take exponential time.

    Raises
    ------
    SandboxError
        After two seconds.
    """
    source = f"import re\nprint(bool(re.fullmatch({pattern!r}, {response.strip()!r})))"
    finished = run_program(source, Limits(seconds=2.0))
    if finished.code != 0:
        raise SandboxError(f"pattern: got {pattern[:50]!r}; {finished.output.strip()[-150:]}")
    return finished.output.strip() == "True"
