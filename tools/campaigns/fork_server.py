"""Start Python programs by fork, from a process that has imported their modules.

Importing JAX and the trainer takes longer than a tiny run. The server imports them once and forks
for each program, before JAX starts threads. A program gets its own environment, folder, arguments
and output, and ends as any Python process does: by its exit code or by a signal.
"""

import gc
import importlib
import json
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class ForkedProcess:
    """A process that a `ForkServer` started, with the part of `subprocess.Popen` that tests use.

    Attributes
    ----------
    pid
        The process ID.
    returncode
        The exit code, or minus the signal that ended the process; None while it runs.
    """

    def __init__(self, connection: socket.socket) -> None:
        # The reply has two lines: the process ID, and the exit code after the process ended.
        with connection:
            self._lines = connection.makefile("r")
        self.pid = int(self._lines.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        return self._poll(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end, at most `timeout` seconds; return the exit code.

        Raises
        ------
        subprocess.TimeoutExpired
            If the process still runs.
        """
        code = self._poll(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process by SIGKILL, unless it has ended."""
        self.send_signal(signal.SIGKILL)

    def _poll(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._lines], [], [], timeout)[0]:
            with self._lines:
                self.returncode = int(self._lines.readline())
        return self.returncode


class ForkServer:
    """A process that imports modules once, and forks for each program.

    Parameters
    ----------
    environment
        All variables of the server: variables that modules read while they are imported.
    modules
        The modules to import.
    """

    def __init__(self, environment: Mapping[str, str], modules: Sequence[str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="forks-")
        self._address = str(Path(self._folder.name) / "socket")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self._address)
        listener.listen()
        with listener:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "campaigns.fork_server", str(listener.fileno()), *modules],
                env=dict(environment),
                pass_fds=[listener.fileno()],
            )

    def start(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        output: Path,
        *,
        neighbour: int | None = None,
        limits: Mapping[str, int] | None = None,
    ) -> ForkedProcess:
        """Start a program.

        Parameters
        ----------
        arguments
            The arguments of ``python -m``.
        environment
            All variables of the program.
        folder
            Its working directory.
        output
            Existing file to which its output is appended.
        neighbour
            ID of a process whose user and mount namespaces it enters.
        limits
            Resource limits, by name in `resource`, such as ``RLIMIT_FSIZE``.
        """
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self._address)
        request = {
            "arguments": list(arguments),
            "environment": dict(environment),
            "folder": str(folder),
            "output": str(output),
            "neighbour": neighbour,
            "limits": dict(limits or {}),
        }
        connection.sendall(json.dumps(request).encode() + b"\n")
        return ForkedProcess(connection)

    def stop(self) -> None:
        """End the server; programs that it started continue."""
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


def _next_request(listener: socket.socket) -> dict[str, Any]:
    """Serve until a request arrives; return it in the process that becomes its program.

    An intermediate process waits for the program and sends its exit code, so that the server never
    waits.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        connection = listener.accept()[0]
        if os.fork() > 0:
            connection.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        listener.close()
        with connection.makefile("r") as lines:
            request: dict[str, Any] = json.loads(lines.readline())
        if (program := os.fork()) == 0:
            connection.close()
            return request
        connection.sendall(f"{program}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
        connection.sendall(f"{code}\n".encode())
        os._exit(0)


def _become(request: dict[str, Any]) -> None:
    """Turn this process into the requested program and run it."""
    settings = {
        name: value
        for name, value in request["environment"].items()
        if name.startswith("JAX_") and os.environ.get(name) != value
    }
    os.environ.clear()
    os.environ.update(request["environment"])
    for name, limit in request["limits"].items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    if request["neighbour"] is not None:
        for namespace, kind in (("user", os.CLONE_NEWUSER), ("mnt", os.CLONE_NEWNS)):
            with Path(f"/proc/{request['neighbour']}/ns/{namespace}").open("rb") as file:
                os.setns(file.fileno(), kind)
    os.chdir(request["folder"])
    output = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    import jax

    for name, value in settings.items():  # JAX read its variables when the server imported it
        known = value.lower() in ("true", "false") or value.isdecimal()
        jax.config.update(name.lower(), json.loads(value.lower()) if known else value)  # type: ignore[no-untyped-call]
    sys.argv = request["arguments"]
    sys.modules.pop(sys.argv[0], None)  # an already imported module must run again, as with -m
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    descriptor, *modules = sys.argv[1:]
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # garbage collection in the program must not touch shared pages
    _become(_next_request(socket.socket(fileno=int(descriptor))))
