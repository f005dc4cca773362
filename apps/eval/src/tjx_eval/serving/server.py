"""The server's process: its socket, what it prints, and how it stops."""

import math
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from tjx_eval.errors import EvalError
from tjx_eval.serving.app import Service
from tjx_eval.serving.connections import MOST_HEADER_BYTES, LimitedProtocol

# Connections are given this long to end by themselves once the engine has ended.
_LAST_SECONDS = 5.0


def open_socket(host: str, port: int) -> socket.socket:
    """Take the port before the model is read; 0 is any free one.

    Raises
    ------
    RunError
        If it cannot be had.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise EvalError(
            f"cannot listen on {host} port {port}: {error.strerror or error}"
        ) from error


def serve(service: Service, listening: socket.socket, *, grace: float) -> int:
    """Answer requests until SIGINT or SIGTERM; return the exit code.

    A signal lets what is running go on for `grace` seconds; a second one ends it at once.
    """
    config = uvicorn.Config(
        service.app(),
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        http=LimitedProtocol,
        h11_max_incomplete_event_size=MOST_HEADER_BYTES,
        timeout_graceful_shutdown=math.ceil(grace + _LAST_SECONDS),
    )
    server = _Server(config, service, grace)
    service.engine.start()
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    sys.stdout.write(f"serving {service.name} at http://{shown}:{port}/v1 (Ctrl-C stops)\n")
    sys.stdout.flush()
    try:
        server.run(sockets=[listening])
    finally:
        service.engine.stop(0.0)
        service.engine.join(_LAST_SECONDS)
    return 128 + server.signal if server.signal else 0


class _Server(uvicorn.Server):
    """Uvicorn's, which a signal asks to stop and does not kill."""

    def __init__(self, config: uvicorn.Config, service: Service, grace: float) -> None:
        super().__init__(config)
        self._service, self._grace = service, grace
        self.signal = 0

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Hear SIGINT and SIGTERM while the server runs."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self.handle_exit) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def handle_exit(self, sig: int, _frame: FrameType | None) -> None:
        """Stop; at the second signal at once."""
        at_once = bool(self.signal)
        self.signal = self.signal or sig
        self.should_exit = True
        self._service.engine.stop(0.0 if at_once else self._grace)
