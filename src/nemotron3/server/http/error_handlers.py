"""Exception handlers: errors of FastAPI, pydantic and the package, all in OpenAI's format."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from nemotron3.errors import Nemotron3Error
from nemotron3.server.http.errors import APIError, internal_error, invalid_request, to_api_error

ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in {
        400: "The request is invalid.",
        401: "The API key is missing or wrong.",
        404: "No such model or response.",
        413: "The body is too large.",
        415: "The body does not say that it is JSON.",
        429: "The queue is full; see Retry-After.",
        500: "The server failed at this request.",
        501: "The server lacks a package for this.",
        503: "The server is shutting down; see Retry-After.",
    }.items()
}


def add_error_handlers(api: FastAPI) -> None:
    """Answer every error in OpenAI's format."""

    @api.exception_handler(RequestValidationError)
    async def invalid_body(_: Request, error: RequestValidationError) -> Response:
        return _answer(_validation_error(error))

    @api.exception_handler(APIError)
    @api.exception_handler(Nemotron3Error)
    async def api_error(_: Request, error: Exception) -> Response:
        found = to_api_error(error)
        if found is None:
            raise error
        return _answer(found)

    @api.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        # The middleware, outside of the framework, sees the error too and logs it.
        del error
        return _answer(internal_error(request.state.request_id))

    @api.exception_handler(HTTPException)
    async def no_such_thing(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.url.path}"
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        headers = dict(error.headers or {})
        return _answer(
            APIError(error.status_code, f"{where}: {error.detail}", code=code, headers=headers)
        )


def _answer(api_error: APIError) -> Response:
    return JSONResponse(api_error.body(), api_error.status, headers=dict(api_error.headers))


def _validation_error(error: RequestValidationError) -> APIError:
    """The first problem of a body, in a sentence that names the field."""
    found = cast(Mapping[str, Any], error.errors()[0])
    kind: str = found["type"]
    param = _place(found["loc"][1:], error.body, is_missing=kind == "missing")
    subject = param or "the body"
    match kind:
        case "extra_forbidden":
            message = f"{subject} is unknown here; check its spelling, or leave it out"
        case "missing":
            message = f"{subject} is missing; it is required"
        case "unsupported":
            context: Mapping[str, Any] = found["ctx"]
            param = ".".join(filter(None, (param, context["param"])))
            message = f"{param} is not supported; {context['remedy']}"
        case _:
            given = found.get("input")
            shown = repr(given) if len(repr(given)) < 100 else f"of type {type(given).__name__}"
            said = str(found["msg"])
            message = f"{subject} is {shown}: {said[:1].lower()}{said[1:]}"
    return invalid_request(message, param)


def _place(parts: Sequence[str | int], body: Any, *, is_missing: bool) -> str | None:
    """The dotted name of the field that pydantic refused; None for the whole body.

    If a field may have several types, pydantic adds the type that it tried to the path. Such a part
    does not exist in the body and is omitted.
    """
    name, value = "", body
    for i, part in enumerate(parts):
        if isinstance(value, Mapping) and part in cast(Mapping[Any, Any], value):
            name, value = f"{name}.{part}", cast(Mapping[Any, Any], value)[part]
        elif isinstance(value, list) and part in range(len(cast(list[Any], value))):
            name, value = f"{name}[{part}]", cast(list[Any], value)[int(part)]
        elif is_missing and i == len(parts) - 1:
            name = f"{name}.{part}"
    return name.removeprefix(".") or None
