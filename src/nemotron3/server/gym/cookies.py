"""The cookie of a session, which every answer sends again.

NeMo Gym's agents take the cookies of the last answer for the next request, and no others: an
answer without the cookie would end their session.
"""

import re
from collections.abc import Mapping

from nemotron3.server.http.middleware import App, Message, Receive, Scope, Send

COOKIE = "nemotron3_session"
_PAIR = re.compile(rf"(?:^|;)\s*{COOKIE}=([\w-]{{1,64}})\s*(?:;|$)".encode())
_SET = b"set-cookie"


def session_cookie(session_id: str) -> str:
    """The header that sets the cookie."""
    return f"{COOKIE}={session_id}; HttpOnly; Path=/; SameSite=lax"


def with_cookies_again(app: App) -> App:
    """An application whose answers have the session's cookie of their request, errors included."""

    async def answering(scope: Scope, receive: Receive, send: Send) -> None:
        found = _PAIR.search(_cookies(scope)) if scope["type"] == "http" else None
        if found is None:
            await app(scope, receive, send)
            return
        again = session_cookie(found[1].decode()).encode()

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                if not any(name == _SET for name, _ in headers):
                    message = {**message, "headers": [*headers, (_SET, again)]}
            await send(message)

        await app(scope, receive, sending)

    return answering


def _cookies(scope: Mapping[str, object]) -> bytes:
    headers: dict[bytes, bytes] = dict(scope["headers"])  # pyright: ignore[reportArgumentType, reportCallIssue, reportUnknownVariableType]
    return headers.get(b"cookie", b"")
