"""CORS: web pages of other origins that may call the server from a browser.

There are none by default, and browsers then block calls from all pages but the server's own.
CORS is outside of the request middleware, because a preflight request (`OPTIONS`) has no API key,
and because pages can read an error only if its response has the CORS headers.
"""

import re
from collections.abc import Sequence
from typing import cast

from starlette.middleware.cors import CORSMiddleware

from nemotron3.errors import ConfigError
from nemotron3.server.http.middleware import App

ANYONE = "*"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@A-Z]+")
_NEEDLESS_PORT = re.compile(r"(http://.*:80|https://.*:443)")


def assert_origins(origins: Sequence[str]) -> None:
    """Refuse an origin that no browser sends; it would allow no page."""
    if ANYONE in origins and len(origins) > 1:
        raise ConfigError(
            f"is {', '.join(origins)}; * allows the others as well", field="allowed_origins"
        )
    for origin in origins:
        is_origin = _ORIGIN.fullmatch(origin) and not _NEEDLESS_PORT.fullmatch(origin)
        if origin != ANYONE and not is_origin:
            raise ConfigError(
                f"has {origin!r}; write an origin as browsers do, scheme and host "
                "in lower case, a port where it is not the usual one, and no path: "
                "https://chat.example.org, or * for every page",
                field="allowed_origins",
            )


def with_cors(app: App, origins: Sequence[str]) -> App:
    """Allow pages of these origins to call the application."""
    if not origins:
        return app
    middleware = CORSMiddleware(
        app,  # pyright: ignore[reportArgumentType]
        allow_origins=origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        expose_headers=("x-request-id", "retry-after"),
    )
    return cast(App, middleware)
