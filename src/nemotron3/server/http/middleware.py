"""The middleware around the application; every request passes it before its handler.

It is plain ASGI and handles what concerns all requests: the request id (`x-request-id`, taken from
the request or generated, and always returned), one log record and one count, the API key, the limit
of the body's size, and a check that the body is JSON. It reads the whole body before the handler
runs. It turns an unexpected exception into a 500 with the request id.

A request must declare its body as JSON in `Content-Type`. Browsers send bodies of other types to
any address without a preflight request, so every page that a user visits could start generation.
"""

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from pydantic_core import from_json

from nemotron3.server.http.drain import InFlightRequests
from nemotron3.server.http.errors import APIError, internal_error, invalid_request, to_api_error
from nemotron3.server.http.metrics import RequestMetrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger("nemotron3.server")
access_log = logging.getLogger("nemotron3.server.access")

_OPEN_PATHS = frozenset({"/", "/health"})  # the page and the probe need no key
_ALWAYS_PATHS = frozenset({"/", "/health", "/metrics"})  # answered while draining too
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_JSON = re.compile(rb"\s*application/([\w.+-]+\+)?json\s*(;|$)", re.IGNORECASE)
_CLIENT_CLOSED_REQUEST = 499
_BODY_TIMEOUT_S = 60.0
"""Seconds for a body to arrive; a client that stalls would block a graceful shutdown."""


class RequestMiddleware:
    """Wraps the application; see the module docstring."""

    def __init__(
        self,
        app: App,
        *,
        in_flight: InFlightRequests,
        metrics: RequestMetrics,
        api_key: str | None,
        max_body_bytes: int,
    ) -> None:
        self._app = app
        self._in_flight = in_flight
        self._metrics = metrics
        self._api_key = api_key.encode() if api_key is not None else None
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        context = RequestContext(scope, send)
        try:
            await self._pass(scope, receive, context)
        except APIError as api_error:
            await context.send_error(api_error)
        except Exception as error:
            api_error = to_api_error(error)
            if api_error is None:
                log.exception("request %s failed", context.request_id)
                api_error = internal_error(context.request_id)
            await context.send_error(api_error)
        finally:
            self._record(scope, context, time.perf_counter() - started)

    async def _pass(self, scope: Scope, receive: Receive, context: "RequestContext") -> None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if scope["path"] not in _OPEN_PATHS:
            self._check_key(headers.get(b"authorization", b""))
        if scope["path"] in _ALWAYS_PATHS:
            await self._app(scope, receive, context.send)
            return
        with self._in_flight.track():
            if scope["method"] == "POST":
                receive = _replay(await self._read_in_time(headers, receive), receive)
            await self._app(scope, receive, context.send)

    def _check_key(self, authorization: bytes) -> None:
        if self._api_key is None:
            return
        scheme, _, key = authorization.partition(b" ")
        # Compared in constant time, so that timing reveals nothing about the key.
        is_right = hmac.compare_digest(key.strip(), self._api_key)
        if scheme.lower() != b"bearer" or not is_right:
            raise APIError(
                401,
                "the API key is missing or wrong; send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _read_in_time(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        try:
            return await asyncio.wait_for(self._read_body(headers, receive), _BODY_TIMEOUT_S)
        except TimeoutError as error:
            raise APIError(
                408,
                f"the body did not arrive in {_BODY_TIMEOUT_S:g} seconds; send it again",
                code="body_too_slow",
                headers={"Connection": "close"},
            ) from error

    async def _read_body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        if not _JSON.match(headers.get(b"content-type", b"")):
            raise APIError(
                415, "the body must be JSON; send the header Content-Type: application/json"
            )
        announced = headers.get(b"content-length", b"")
        if announced.isdigit() and int(announced) > self._max_body_bytes:
            raise self._too_large()
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnectedError
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                break
        body = b"".join(parts)
        try:
            # Stricter than the standard library: no NaN, no unpaired surrogate.
            from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise invalid_request(f"the body is not JSON: {error}", code="invalid_json") from error
        return body

    def _too_large(self) -> APIError:
        bound = f"{self._max_body_bytes:,} bytes"
        return APIError(
            413,
            f"the body is larger than {bound}; shorten it, or start the server with a larger "
            f"--max-body-mib",
            code="body_too_large",
            headers={"Connection": "close"},
        )

    def _record(self, scope: Scope, context: "RequestContext", duration_s: float) -> None:
        route: Any = scope.get("route")
        path: str = getattr(route, "path", "unknown")
        self._metrics.count_request(path, context.status, duration_s)
        fields = {
            "request_id": context.request_id,
            "method": scope["method"],
            "path": scope["path"],
            "status": context.status,
            "duration_ms": round(1000 * duration_s, 1),
            **context.notes,
        }
        access_log.info("request", extra={"fields": fields})


class ClientDisconnectedError(APIError):
    """The client has disconnected; the status is for the log only."""

    def __init__(self) -> None:
        super().__init__(_CLIENT_CLOSED_REQUEST, "the client went away", code="client_gone")


class RequestContext:
    """The id of a request, and the state of its response."""

    def __init__(self, scope: Scope, send: Send) -> None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        is_usable = _REQUEST_ID.fullmatch(given) is not None
        self.request_id = given.decode("ascii") if is_usable else uuid.uuid4().hex
        self.status = _CLIENT_CLOSED_REQUEST
        self.notes: dict[str, Any] = {}
        self._send = send
        self._has_started = False
        scope.setdefault("state", {}).update(request_id=self.request_id, notes=self.notes)

    async def send(self, message: Message) -> None:
        """Send a part of the response; its start gets the request id."""
        if message["type"] == "http.response.start":
            self._has_started = True
            self.status = message["status"]
            identity = (b"x-request-id", self.request_id.encode("ascii"))
            message = {**message, "headers": [*message.get("headers", ()), identity]}
        await self._send(message)

    async def send_error(self, api_error: APIError) -> None:
        """Answer with an error, unless the response has started."""
        if self._has_started:
            return
        body = json.dumps(api_error.body(), ensure_ascii=False).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            **api_error.headers,
        }
        encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        start = {"type": "http.response.start", "status": api_error.status, "headers": encoded}
        await self.send(start)
        await self.send({"type": "http.response.body", "body": body})


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that first returns the body that was read, then the client's next messages."""
    waiting = [body]

    async def replayed() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replayed
