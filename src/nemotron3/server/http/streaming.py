"""Answers that arrive in pieces (server-sent events), and clients that leave before the end.

A client is watched while it waits, not only while it is written to: a prompt that is being read
for a minute writes nothing, and its client may be long gone. Whoever leaves, the job is cancelled,
and with it the engine's request.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from pydantic_core import to_json

from nemotron3.server.http.middleware import ClientGoneError, Receive, Scope, Send

T = TypeVar("T")
Stop = Callable[[], Awaitable[None]]

DONE = b"data: [DONE]\n\n"


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event whose data is JSON, which holds no line end."""
    head = f"event: {name}\n".encode() if name else b""
    return b"%sdata: %s\n\n" % (head, to_json(data))


class EventStream(Response):
    """Sends events as they come; stops the generator where the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], stop: Stop) -> None:
        super().__init__(
            # Proxies would otherwise collect the pieces.
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._events = events
        self._stop = stop

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the answer."""
        try:
            await unless_gone(receive, self._write(send), self._stop)
        except ClientGoneError:
            # An answer is under way, so there is nobody and nothing to tell.
            scope["state"]["notes"]["client_left"] = True

    async def _write(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            async for data in events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def submitted(request: Request, job: Coroutine[Any, Any, T]) -> T:
    """The job's result; a client that leaves while its grammar waits gives its turn up."""
    return await unless_gone(request.receive, job, _nothing)


async def _nothing() -> None:
    pass


async def answered(request: Request, job: Coroutine[Any, Any, T], stop: Stop) -> T:
    """The job's result, unless the client leaves before."""
    return await unless_gone(request.receive, job, stop)


async def unless_gone(receive: Receive, job: Coroutine[Any, Any, T], stop: Stop) -> T:
    """Run a job to its end, or cancel it and raise `ClientGoneError` where the client leaves.

    `stop` is called in any case: a job that was cancelled before it began cleans up nothing.
    """
    working = asyncio.ensure_future(job)
    leaving = asyncio.ensure_future(_leaves(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
        await stop()


async def _leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
