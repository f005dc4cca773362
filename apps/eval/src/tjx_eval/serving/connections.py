"""HTTP connections with limits: how many there are, and how long a request may take to arrive."""

import resource
import time
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0
"""How long a connection may stay without a complete request line and headers."""
MOST_HEADER_BYTES = 16 << 10
_MOST_CONNECTIONS = 512


def most_connections() -> int:
    """Return how many connections are kept: half of the files that this process may open."""
    return min(_MOST_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


class LimitedProtocol(H11Protocol):
    """Uvicorn's HTTP/1.1, which closes connections that send no request.

    Without it a thousand connections that stay silent use up the files of the process, and no one
    else is answered. Where the limit is reached the silent one that waits longest is closed; if all
    are being answered, the new one is.
    """

    def connection_made(self, transport: Any) -> None:
        """Take a connection, or close one that is too many; uvloop has transports of its own."""
        super().connection_made(transport)
        self._waits_since = time.monotonic()
        self._arm()
        if len(self.connections) > most_connections():
            ours = [other for other in self.connections if isinstance(other, LimitedProtocol)]
            silent = [other for other in ours if _is_silent(other)]
            oldest = min(silent, key=lambda other: other._waits_since, default=self)
            oldest.transport.abort()

    def on_response_complete(self) -> None:
        """Wait for the next request as long as for the first."""
        super().on_response_complete()
        self._waits_since = time.monotonic()
        self._arm()

    def _arm(self) -> None:
        self.loop.call_later(HEADER_SECONDS, self._close_if_silent, self._waits_since)

    def _close_if_silent(self, since: float) -> None:
        if since == self._waits_since and _is_silent(self):
            self.transport.abort()


def _is_silent(protocol: Any) -> bool:
    """Tell whether a connection has no request that is being answered."""
    return protocol.cycle is None or protocol.cycle.response_complete
