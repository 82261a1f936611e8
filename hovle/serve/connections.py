"""Connections of `hovle serve`: silent ones are closed in time, and make room for others."""

import asyncio
import resource
from typing import cast

from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 512
"""Connections held at a time, fewer where the system allows few open files."""

MAX_SECONDS_FOR_HEADERS = 20.0
"""Time in which the headers of a request must have come, and the rest of one that was refused."""


def most_connections() -> int:
    """Connections this process may hold and still have files for pictures and models."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MAX_CONNECTIONS if limit == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, limit // 2)


class BoundedConnection(H11Protocol):
    """A connection with a deadline for headers; beyond the most connections, the longest silent one is closed."""

    _timer: asyncio.TimerHandle | None = None
    _silent_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._silent_since = self.loop.time()
        self._watch()
        others = cast("set[BoundedConnection]", self.connections)
        if len(others) > most_connections():
            silent = [connection for connection in others if connection.is_silent]
            min(silent, key=lambda connection: connection._silent_since).transport.close()

    def data_received(self, data: bytes) -> None:
        """Take data; a request whose headers are complete has its time."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        super().on_response_complete()
        self._silent_since = self.loop.time()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        super().connection_lost(exc)
        if self._timer:
            self._timer.cancel()

    @property
    def is_silent(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _watch(self) -> None:
        if self._timer and not self.is_silent:
            self._timer.cancel()
            self._timer = None
        elif self.is_silent and self._timer is None:
            self._timer = self.loop.call_later(MAX_SECONDS_FOR_HEADERS, self._give_up)

    def _give_up(self) -> None:
        self._timer = None
        if self.is_silent:
            self.transport.close()
