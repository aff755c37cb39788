"""Run the application with uvicorn, and end it gracefully.

The first SIGTERM or SIGINT begins to drain: the port stays open and new requests get 503 with
`Retry-After`, so that a balancer notices and sends them elsewhere, while those inside are finished.
When the last is, or after `drain_timeout_s`, the server ends; whoever is not finished by then is
told so, by a 503 or an error in the stream. A second signal ends it at once.
"""

import asyncio
import gc
import logging
import signal
import socket
from types import FrameType

import uvicorn

from nemotron3.errors import ConfigError
from nemotron3.server.app import Server

log = logging.getLogger("nemotron3.server")

_LAST_WORDS_S = 2
"""Seconds in which those that are given up are told."""


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
        log.info("requests are taken")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, end at the second."""
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
        log.info("%s: no more requests are taken; %d are being finished", name, in_flight.count)
        if not await in_flight.wait_empty(self._drain_timeout_s):
            log.warning(
                "%d requests were not finished in %g s and are given up",
                in_flight.count,
                self._drain_timeout_s,
            )
            await asyncio.to_thread(self._server.llm.close)
            await in_flight.wait_empty(_LAST_WORDS_S)
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """Take the address, without listening yet: a model need not be loaded to find it taken."""
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
    """Serve until a signal says that it is enough; then the engine ends too."""
    config = uvicorn.Config(
        server.app,  # pyright: ignore[reportArgumentType]
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=_LAST_WORDS_S,
    )
    # Modules, the model and routes stay to the end: hundreds of thousands of objects. To look for
    # garbage among them would stop everybody's answers for a twentieth of a second.
    gc.collect()
    gc.freeze()
    try:
        _Uvicorn(config, server, drain_timeout_s).run([bound])
    finally:
        server.llm.close()
