"""What all requests in work hold together, within bounds."""

from .failures import RequestError
from .limits import MAX_REQUESTS

MAX_BYTES = 512 * 2**20
"""Bytes of bodies and fetched pictures of all requests in work."""


class Load:
    """The sum over all requests in work.

    Args:
        max_requests: Most requests.
    """

    def __init__(self, max_requests: int = MAX_REQUESTS) -> None:
        self.max_requests = max_requests
        self.num_requests = 0
        self.num_bytes = 0


class Share:
    """What one request holds until it is over.

    Raises:
        RequestError: Status 429, where there is no room for another request.
    """

    def __init__(self, load: Load):
        if load.num_requests >= load.max_requests:
            raise _overloaded(f"has {load.num_requests} requests to answer, its most", 429)
        load.num_requests += 1
        self._load = load
        self._num_bytes = 0
        self._is_over = False

    def take(self, num_bytes: int) -> None:
        """Hold so many bytes more.

        Raises:
            RequestError: Status 503, where all requests together would hold too many.
        """
        if self._load.num_bytes + num_bytes > MAX_BYTES:
            raise _overloaded(f"holds {self._load.num_bytes >> 20} MiB of requests")
        self._load.num_bytes += num_bytes
        self._num_bytes += num_bytes

    def give_back(self) -> None:
        """End the request; a stream may end in more than one way."""
        if not self._is_over:
            self._is_over = True
            self._load.num_requests -= 1
            self._load.num_bytes -= self._num_bytes


def _overloaded(why: str, status: int = 503) -> RequestError:
    return RequestError(f"The server {why}; try again.", code="overloaded", status=status)
