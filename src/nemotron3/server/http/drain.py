"""Requests in flight, and whether new ones are accepted, for a graceful shutdown.

After `stop_accepting()` new requests are refused with 503 and `Retry-After`, so that a client or a
load balancer tries another server; requests in flight are finished.
"""

import asyncio
from collections.abc import Generator
from contextlib import contextmanager

from nemotron3.server.http.errors import APIError

_RETRY_AFTER_S = 5


class InFlightRequests:
    """Counts requests in flight, on one event loop."""

    def __init__(self) -> None:
        self.is_accepting = True
        self.count = 0
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    @contextmanager
    def track(self) -> Generator[None, None, None]:
        """Count a request while it is in flight, or refuse it."""
        if not self.is_accepting:
            raise APIError(
                503,
                "the server is shutting down and takes no more requests; try another one, or this "
                "one again when it is back",
                code="draining",
                headers={"Retry-After": str(_RETRY_AFTER_S), "Connection": "close"},
            )
        self.count += 1
        self._is_empty.clear()
        try:
            yield
        finally:
            self.count -= 1
            if not self.count:
                self._is_empty.set()

    def stop_accepting(self) -> None:
        """Refuse new requests."""
        self.is_accepting = False

    async def wait_empty(self, timeout_s: float) -> bool:
        """Wait until none is in flight; False if that takes longer than the timeout."""
        try:
            await asyncio.wait_for(self._is_empty.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
