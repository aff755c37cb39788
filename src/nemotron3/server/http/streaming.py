"""Server-sent events, and clients that disconnect before the end.

A disconnect is noticed while a client waits, not only when something is sent to it: prefill of a
long prompt may send nothing for a minute. The job of a client that disconnects is cancelled, and
with it the request in the engine.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from pydantic_core import to_json

from nemotron3.server.http.middleware import ClientDisconnectedError, Receive, Scope, Send

T = TypeVar("T")
Stop = Callable[[], Awaitable[None]]

DONE = b"data: [DONE]\n\n"


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event; its data is JSON on one line."""
    head = f"event: {name}\n".encode() if name else b""
    return b"%sdata: %s\n\n" % (head, to_json(data))


class EventStream(Response):
    """Sends events as they are generated; closes the generator if the client disconnects."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], stop: Stop) -> None:
        super().__init__(
            # Without these, proxies buffer the events.
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._events = events
        self._stop = stop

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        try:
            await cancel_on_disconnect(receive, self._write(send), self._stop)
        except ClientDisconnectedError:
            # The response has started, so no error can be sent.
            scope["state"]["notes"]["client_left"] = True

    async def _write(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            async for data in events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def submitted(request: Request, job: Coroutine[Any, Any, T]) -> T:
    """The result of a submission; cancelled if the client disconnects before it is done."""
    return await cancel_on_disconnect(request.receive, job, _nothing)


async def _nothing() -> None:
    pass


async def answered(request: Request, job: Coroutine[Any, Any, T], stop: Stop) -> T:
    """The result of a job; cancelled, and `stop` called, if the client disconnects."""
    return await cancel_on_disconnect(request.receive, job, stop)


async def cancel_on_disconnect(receive: Receive, job: Coroutine[Any, Any, T], stop: Stop) -> T:
    """Run a job to its end; cancel it and raise ClientDisconnectedError if the client disconnects.

    `stop` is called in any case, because a job that is cancelled before it begins does not clean
    up.
    """
    working = asyncio.ensure_future(job)
    disconnected = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnectedError
        return working.result()
    finally:
        for task in (working, disconnected):
            task.cancel()
        await asyncio.gather(working, disconnected, return_exceptions=True)
        await stop()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
