"""Errors as answers, in OpenAI's format: the problem, the field, and the remedy.

    {"error": {"message": …, "type": "invalid_request_error", "param": "top_p", "code": null}}

The package's own errors become HTTP errors here: an invalid value is 400 and its `field` is
`param`, a full queue is 429. Any other error is 500; its answer holds the request's id and no
details, which are in the log under that id.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from nemotron3.errors import DependencyMissingError, InvalidValueError, OverloadedError

RETRY_AFTER_S = 1
"""Seconds after which a request that was refused by a full queue may be tried again."""

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
    """An error that is the answer to a request."""

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
def client_names(names: Mapping[str, str]) -> Generator[None, None, None]:
    """Re-raise errors of fields under the client's names of these fields.

    `names` maps the package's names to the client's.
    """
    try:
        yield
    except InvalidValueError as error:
        raise error.renamed(names) from error


def invalid_request(message: str, param: str | None = None, code: str | None = None) -> APIError:
    """The error for an invalid request."""
    return APIError(400, message, param, code)


def to_api_error(error: Exception) -> APIError | None:
    """The answer for an error of this package; None for one that is the server's own fault."""
    match error:
        case APIError():
            return error
        case InvalidValueError():
            return invalid_request(str(error), error.field)
        case OverloadedError():
            headers = {"Retry-After": str(RETRY_AFTER_S)}
            return APIError(429, str(error), code="queue_full", headers=headers)
        case DependencyMissingError():
            return APIError(501, str(error), code="not_installed")
        case _:
            return None


def internal_error(request_id: str) -> APIError:
    """An error of the server itself."""
    return APIError(
        500,
        f"the server failed at this request ({request_id}); its log says why. Other requests go "
        f"on, and this one may be tried again",
        code="internal_error",
    )
