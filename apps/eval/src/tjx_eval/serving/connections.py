"""Limits on HTTP connections: their number, and the time for a request to arrive."""

import resource
import time
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0
"""Maximum time for a complete request line and headers."""
MAX_HEADER_BYTES = 16 << 10
_MAX_CONNECTIONS = 512


def max_connections() -> int:
    """Return the limit on connections: at most half of the process's open-file limit."""
    return min(_MAX_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


class LimitedProtocol(H11Protocol):
    """Uvicorn's HTTP/1.1 protocol, which also closes idle connections.

    Otherwise idle connections could use up the file descriptors of the process. At the limit, the
    longest idle connection is closed, or the new one if all others have requests in progress.
    """

    def connection_made(self, transport: Any) -> None:
        """Accept a connection, closing one if there are too many; uvloop has its own transports."""
        super().connection_made(transport)
        self._idle_since = time.monotonic()
        self._start_timer()
        if len(self.connections) > max_connections():
            ours = [other for other in self.connections if isinstance(other, LimitedProtocol)]
            idle = [other for other in ours if _is_idle(other)]
            oldest = min(idle, key=lambda other: other._idle_since, default=self)
            oldest.transport.abort()

    def on_response_complete(self) -> None:
        """Restart the timer for the next request."""
        super().on_response_complete()
        self._idle_since = time.monotonic()
        self._start_timer()

    def _start_timer(self) -> None:
        self.loop.call_later(HEADER_SECONDS, self._close_if_idle, self._idle_since)

    def _close_if_idle(self, since: float) -> None:
        if since == self._idle_since and _is_idle(self):
            self.transport.abort()


def _is_idle(protocol: Any) -> bool:
    """Return whether a connection has no request in progress."""
    return protocol.cycle is None or protocol.cycle.response_complete
