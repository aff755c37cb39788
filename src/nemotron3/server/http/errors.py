"""Answers that are errors, in OpenAI's shape: what was wrong, where, and what to do.

    {"error": {"message": …, "type": "invalid_request_error", "param": "top_p", "code": null}}

The package's own errors become HTTP errors here: what a client got wrong is 400, what the server
has too much of is 429. Anything else is 500 and says nothing of the inside but the request's id,
under which the log has the rest.
"""

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from nemotron3.errors import ConfigError, DataError, DependencyMissingError, OverloadedError

RETRY_AFTER_S = 1
"""Seconds after which a request that found the queue full may try again."""

_NAME = re.compile(r"^[A-Za-z_]\w*(?:\[\d+\]|\.\w+)*")
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


@dataclass
class APIError(Exception):
    """A request that gets an error for an answer."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])

    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }


@contextmanager
def rename_params(names: Mapping[str, str]) -> Generator[None, None, None]:
    """Give what is refused within the names by which the client knows it.

    `names` maps the package's to the client's; "" is for errors that name nothing.
    """
    try:
        yield
    except Exception as error:
        api_error = to_api_error(error)
        if api_error is None or api_error.status != 400:
            raise
        message = api_error.message
        for ours, theirs in names.items():
            if ours:  # a name that is a word as well is one where it begins the message
                place = "(?<![\\w.])" if "_" in ours else "^"
                message = re.sub(rf"{place}{ours}\b", theirs, message)
        param = names.get(api_error.param or "", api_error.param)
        raise APIError(
            api_error.status, message, param, api_error.code, api_error.headers
        ) from error


def invalid_request(message: str, param: str | None = None, code: str | None = None) -> APIError:
    """A request that asks for what cannot be."""
    return APIError(400, message, param, code)


def to_api_error(error: Exception) -> APIError | None:
    """What a client is told of an error of this package; None where it is none of theirs.

    `param` is the error's `field`. Where it has none, it is the name that its message begins with
    (`messages[0].role is …`), if it does.
    """
    if isinstance(error, APIError):
        return error
    if isinstance(error, OverloadedError):
        headers = {"Retry-After": str(RETRY_AFTER_S)}
        return APIError(429, str(error), code="queue_full", headers=headers)
    if isinstance(error, DependencyMissingError):
        return APIError(501, str(error), code="not_installed")
    if isinstance(error, ConfigError | DataError):
        message = str(error)
        if error.field is not None:
            return invalid_request(message, error.field)
        named = _NAME.match(message)
        follows = message[named.end() :].lstrip() if named is not None else ""
        is_named = follows.startswith(("is ", "are ", "= ", ": ", "has ", "must "))
        return invalid_request(message, named[0] if named is not None and is_named else None)
    return None


def internal_error(request_id: str) -> APIError:
    """An error of the server itself."""
    return APIError(
        500,
        f"the server failed at this request ({request_id}); its log says why. Other requests go "
        f"on, and this one may be tried again",
        code="internal_error",
    )
