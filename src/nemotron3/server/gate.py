"""Who is inside, and whether anyone else may come in: what a graceful end needs to know.

After `close()` new work is refused with 503 and `Retry-After`, so that a client or a balancer goes
elsewhere; work that is inside goes on to its end.
"""

import asyncio
from collections.abc import Generator
from contextlib import contextmanager

from nemotron3.server.refusals import RefusedError

_RETRY_AFTER_S = 5


class Gate:
    """Counts requests in flight; of one event loop."""

    def __init__(self) -> None:
        self.is_open = True
        self.num_inside = 0
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    @contextmanager
    def inside(self) -> Generator[None, None, None]:
        """Let one request in, or refuse it."""
        if not self.is_open:
            raise RefusedError(
                503,
                "the server is shutting down and takes no more requests; try another one, or this "
                "one again when it is back",
                code="draining",
                headers={"Retry-After": str(_RETRY_AFTER_S), "Connection": "close"},
            )
        self.num_inside += 1
        self._is_empty.clear()
        try:
            yield
        finally:
            self.num_inside -= 1
            if not self.num_inside:
                self._is_empty.set()

    def close(self) -> None:
        """Let nobody in any more."""
        self.is_open = False

    async def emptied(self, timeout_s: float) -> bool:
        """Wait until nobody is inside; False where that takes longer."""
        try:
            await asyncio.wait_for(self._is_empty.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
