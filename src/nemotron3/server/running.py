"""Run the application with uvicorn, and end it gracefully.

The first SIGTERM or SIGINT closes the gate: the port stays open and new requests get 503 with
`Retry-After`, so that a balancer notices and sends them elsewhere, while those inside are finished.
When the last is, or after `drain_timeout_s`, the server ends. A second signal ends it at once.
"""

import asyncio
import logging
import signal
import socket
from types import FrameType

import uvicorn

from nemotron3.server.app import Server

log = logging.getLogger("nemotron3.server")


class _Uvicorn(uvicorn.Server):
    """Uvicorn, with two steps to its end."""

    def __init__(self, config: uvicorn.Config, server: Server, drain_timeout_s: float) -> None:
        super().__init__(config)
        self._server = server
        self._drain_timeout_s = drain_timeout_s
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, end at the second."""
        del frame
        if self._loop is None or not self._server.gate.is_open:
            self.should_exit = self.force_exit = True
            return
        name = signal.Signals(sig).name
        self._server.gate.close()
        self._loop.call_soon_threadsafe(self._begin_drain, name)

    def _begin_drain(self, name: str) -> None:
        self._draining = asyncio.ensure_future(self._drain(name))

    async def _drain(self, name: str) -> None:
        gate = self._server.gate
        log.info("%s: no more requests are taken; %d are being finished", name, gate.num_inside)
        if not await gate.emptied(self._drain_timeout_s):
            log.warning(
                "%d requests were not finished in %g s and are given up",
                gate.num_inside,
                self._drain_timeout_s,
            )
        self.should_exit = True


def serve(server: Server, *, host: str, port: int, drain_timeout_s: float) -> None:
    """Serve until a signal says that it is enough; then the engine ends too."""
    config = uvicorn.Config(
        server.app,  # pyright: ignore[reportArgumentType]
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=2,
    )
    try:
        _Uvicorn(config, server, drain_timeout_s).run()
    finally:
        server.llm.close()
