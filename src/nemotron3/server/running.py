"""Run the application with uvicorn, and shut it down gracefully.

The first SIGTERM or SIGINT starts draining: the port stays open and new requests get 503 with
`Retry-After`, so that a load balancer sends them elsewhere; requests in flight are finished. The
server stops when the last one is finished, or after `drain_timeout_s`; requests that are unfinished
then get a 503 or an error in their stream. A second signal stops the server immediately.
"""

import asyncio
import gc
import logging
import signal
import socket
from types import FrameType
from typing import Protocol

import uvicorn

from nemotron3.errors import ConfigError
from nemotron3.server.http.drain import InFlightRequests
from nemotron3.server.http.middleware import App

log = logging.getLogger("nemotron3.server")

_ABORT_TIMEOUT_S = 2
"""Seconds to send errors to requests that are aborted."""


class Server(Protocol):
    """What can be served: an application, and what a graceful shutdown needs of it."""

    @property
    def app(self) -> App:
        """The application, for ASGI."""
        ...

    @property
    def in_flight(self) -> InFlightRequests:
        """Its requests."""
        ...

    def close(self) -> None:
        """Abort what is unfinished."""
        ...


class _Uvicorn(uvicorn.Server):
    """Uvicorn with a shutdown in two steps: drain, then exit."""

    def __init__(self, config: uvicorn.Config, server: Server, drain_timeout_s: float) -> None:
        super().__init__(config)
        self._server = server
        self._drain_timeout_s = drain_timeout_s
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        log.info("requests are accepted")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, exit at the second."""
        del frame
        if self._loop is None or not self._server.in_flight.is_accepting:
            self.should_exit = self.force_exit = True
            return
        name = signal.Signals(sig).name
        self._server.in_flight.stop_accepting()
        self._loop.call_soon_threadsafe(self._begin_drain, name)

    def _begin_drain(self, name: str) -> None:
        self._draining = asyncio.ensure_future(self._drain(name))

    async def _drain(self, name: str) -> None:
        in_flight = self._server.in_flight
        log.info("%s: new requests are refused; %d are being finished", name, in_flight.count)
        if not await in_flight.wait_empty(self._drain_timeout_s):
            log.warning(
                "%d requests were not finished in %g s and are aborted",
                in_flight.count,
                self._drain_timeout_s,
            )
            await asyncio.to_thread(self._server.close)
            await in_flight.wait_empty(_ABORT_TIMEOUT_S)
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """Bind the address without listening, so that an error precedes the loading of a model."""
    if not 0 <= port < 2**16:
        raise ConfigError(f"port {port} does not exist; choose one below 65,536 with --port")
    bound = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        if bound is not None:
            bound.close()
        raise ConfigError(
            f"port {port} of {host} cannot be taken ({error}); choose others with --host, --port"
        ) from error
    return bound


def serve(server: Server, bound: socket.socket, *, drain_timeout_s: float) -> None:
    """Serve until a signal arrives; then close the server."""
    config = uvicorn.Config(
        server.app,  # pyright: ignore[reportArgumentType]
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=_ABORT_TIMEOUT_S,
    )
    # Modules, the model and routes live as long as the process: hundreds of thousands of objects. A
    # garbage collection that visits them stops all answers for 50 ms.
    gc.collect()
    gc.freeze()
    try:
        _Uvicorn(config, server, drain_timeout_s).run([bound])
    finally:
        server.close()
