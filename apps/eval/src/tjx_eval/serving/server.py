"""Server process: listening socket, signal handling and graceful shutdown."""

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
from tjx_eval.serving.connections import MAX_HEADER_BYTES, LimitedProtocol

# Time for connections to close after the engine has stopped.
_CLOSE_SECONDS = 5.0


def open_socket(host: str, port: int) -> socket.socket:
    """Bind a port before the model is loaded; 0 is any free port.

    Raises
    ------
    EvalError
        If the port is not available.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = error.strerror or error
        raise EvalError(f"cannot listen on {host} port {port}: {reason}") from error


def serve(service: Service, listening: socket.socket, *, grace: float) -> int:
    """Serve until SIGINT or SIGTERM; return the exit code.

    After a signal, running requests have `grace` seconds to finish; a second signal ends them.
    """
    config = uvicorn.Config(
        service.app(),
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        http=LimitedProtocol,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_graceful_shutdown=math.ceil(grace + _CLOSE_SECONDS),
    )
    server = _Server(config, service, grace)
    service.engine.start()
    host, port = listening.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    url = f"http://{address}:{port}"
    sys.stdout.write(f"serving {service.name} at {url}/v1, chat page {url} (Ctrl-C stops)\n")
    sys.stdout.flush()
    try:
        server.run(sockets=[listening])
    finally:
        service.engine.stop(0.0)
        service.engine.join(_CLOSE_SECONDS)
    return 128 + server.signal if server.signal else 0


class _Server(uvicorn.Server):
    """Uvicorn's server, which a signal stops without ending the process."""

    def __init__(self, config: uvicorn.Config, service: Service, grace: float) -> None:
        super().__init__(config)
        self._service, self._grace = service, grace
        self.signal = 0

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM while the server runs."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        previous = [signal.signal(number, self.handle_exit) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, previous, strict=True):
                signal.signal(number, handler)

    def handle_exit(self, sig: int, _frame: FrameType | None) -> None:
        """Stop with the grace period, or at once after a second signal."""
        at_once = bool(self.signal)
        self.signal = self.signal or sig
        self.should_exit = True
        self._service.engine.stop(0.0 if at_once else self._grace)
