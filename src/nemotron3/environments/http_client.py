"""JSON over HTTP for environments that live in another process: one request at a time, retried.

The standard library's client runs in a few threads. So a client belongs to no event loop (each
round of rollouts has its own), and the core needs no further package. Every request has its own
connection: a policy's turn takes longer than servers keep idle ones open, and a request that is
sent into a closing connection may or may not have been executed.
"""

import asyncio
import http.client
import json
import ssl
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from nemotron3.errors import ConfigError, Nemotron3Error

_BUSY = (429, 503)
"""Statuses of a server that has not executed the request."""
_MAX_DELAY_S = 10.0


class ServerFailedError(Nemotron3Error, RuntimeError):
    """A server that did not answer, or answered that it failed."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The answer to a request."""

    status: int
    body: bytes
    cookies: Mapping[str, str]

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode("utf-8", "replace")

    def json(self) -> Any:
        """The body as JSON; raises `ServerFailedError` where it is none."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise ServerFailedError(f"the answer is not JSON: {self.text[:100]!r}") from error


@dataclass(frozen=True, kw_only=True)
class HttpLimits:
    """How long, how often and how much."""

    timeout_s: float = 60.0
    """Seconds of silence after which a request has failed."""
    max_attempts: int = 3
    """How often a request is sent that fails and may be repeated."""
    delay_s: float = 0.5
    """Before the second attempt; twice as long before each further one."""
    max_connections: int = 64
    """Requests at the same time."""
    max_body_bytes: int = 16 * 2**20
    """Largest answer."""

    def __post_init__(self) -> None:
        for name in ("timeout_s", "max_attempts", "max_connections", "max_body_bytes"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"is {getattr(self, name)}; it must be above 0", field=name)
        if self.delay_s < 0:
            raise ConfigError(f"is {self.delay_s}; it must be 0 or more", field="delay_s")


class HttpClient:
    """Requests to one server."""

    def __init__(self, url: str, limits: HttpLimits) -> None:
        """`url` is that of the server, such as http://127.0.0.1:8001."""
        self._at = _split(url)
        self.url, self._limits = url.rstrip("/"), limits
        self._threads = ThreadPoolExecutor(limits.max_connections, thread_name_prefix="http")

    async def post(
        self,
        path: str,
        body: Any,
        *,
        cookies: Mapping[str, str],
        may_repeat: bool,
    ) -> Reply:
        """Send JSON to an address of the server.

        A request that was certainly not executed (nobody listens, or the server is busy) is
        repeated in any case, one that failed otherwise only if it `may_repeat`. Raises
        `ServerFailedError` where all attempts failed. A status of 400 to 499 is an answer.
        """
        data = json.dumps(body, ensure_ascii=False).encode()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._threads, self._repeated, "POST", path, data, dict(cookies), may_repeat
        )

    def get(self, path: str) -> Reply:
        """Read an address of the server, waiting for it."""
        return self._repeated("GET", path, None, {}, may_repeat=True)

    def _repeated(
        self,
        method: str,
        path: str,
        data: bytes | None,
        cookies: Mapping[str, str],
        may_repeat: bool,  # noqa: FBT001 - of an executor's call
    ) -> Reply:
        delay_s, where = self._limits.delay_s, f"{method} {self.url}{path}"
        for attempt in range(1, self._limits.max_attempts + 1):
            is_last = attempt == self._limits.max_attempts
            try:
                reply, wait_s = self._once(method, path, data, cookies)
                if reply.status < 500 and reply.status not in _BUSY:
                    return reply
                why = f"was answered {reply.status}: {reply.text[:300]}"
                is_safe = may_repeat or reply.status in _BUSY
            except ConnectionRefusedError as error:
                why, wait_s, is_safe = f"found nobody ({error}); is the server running?", None, True
            except (OSError, http.client.HTTPException, UnicodeError) as error:
                why, wait_s, is_safe = f"failed ({type(error).__name__}: {error})", None, may_repeat
            if is_last or not is_safe:
                times = "" if attempt == 1 else f", {attempt} times"
                raise ServerFailedError(f"{where} {why}{times}")
            time.sleep(min(_MAX_DELAY_S, delay_s if wait_s is None else wait_s))
            delay_s *= 2
        raise AssertionError("unreachable: max_attempts is at least 1")

    def _once(
        self, method: str, path: str, data: bytes | None, cookies: Mapping[str, str]
    ) -> tuple[Reply, float | None]:
        """One attempt: the reply, and how long a busy server asks to wait."""
        limits, at = self._limits, self._at
        connection = (
            http.client.HTTPSConnection(
                at.hostname or "", at.port, timeout=limits.timeout_s,
                context=ssl.create_default_context(),
            )
            if at.scheme == "https"
            else http.client.HTTPConnection(at.hostname or "", at.port, timeout=limits.timeout_s)
        )  # fmt: skip
        headers = {"Connection": "close", "Accept": "application/json, text/plain"}
        if data is not None:
            headers["Content-Type"] = "application/json"
        if cookies:
            headers["Cookie"] = "; ".join(f"{name}={value}" for name, value in cookies.items())
        try:
            connection.request(method, f"{at.path.rstrip('/')}{path}", body=data, headers=headers)
            answer = connection.getresponse()
            body = answer.read(limits.max_body_bytes + 1)
            if len(body) > limits.max_body_bytes:
                raise http.client.HTTPException(
                    f"the answer has more than {limits.max_body_bytes:,} bytes"
                )
            if 300 <= answer.status < 400:
                raise http.client.HTTPException(
                    f"answered {answer.status}, to {answer.headers.get('Location')}; "
                    "give the address that it leads to"
                )
            reply = Reply(status=answer.status, body=body, cookies=_set_cookies(answer.headers))
            return reply, _seconds(answer.headers.get("Retry-After"))
        finally:
            connection.close()


def _split(url: str) -> SplitResult:
    try:
        at = urlsplit(url)
        is_whole = at.scheme in ("http", "https") and bool(at.hostname) and at.port != 0
    except ValueError:
        at, is_whole = urlsplit(""), False
    if not is_whole or at.query or at.fragment or at.username is not None:
        raise ConfigError(
            f"{url!r} is no address of a server; give one such as http://127.0.0.1:8001"
        )
    return at


def _set_cookies(headers: http.client.HTTPMessage) -> dict[str, str]:
    pairs = (line.partition(";")[0].partition("=") for line in headers.get_all("Set-Cookie") or ())
    return {name.strip(): value.strip() for name, equals, value in pairs if equals}


def _seconds(text: str | None) -> float | None:
    return float(text) if text is not None and text.isascii() and text.isdigit() else None
