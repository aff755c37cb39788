"""The application: which address does what.

    app = create_app(AsyncLLM("runs/tiny/model"), ServerSettings(served_model_name="tiny"))
    await run(app, host="127.0.0.1", port=8000)

Handlers are short because each endpoint is three steps: a plan from the body, a prompt from the
plan, an answer from the engine, whole or as a stream. Whatever can be wrong with a request is found
in the first two or when the engine takes it, so it is an HTTP status and not an event in a stream.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from nemotron3.errors import Nemotron3Error
from nemotron3.inference.async_llm import AsyncLLM
from nemotron3.inference.requests import SamplingParams
from nemotron3.server.answering import Desk
from nemotron3.server.border import App, Border
from nemotron3.server.chat import ChatAnswer, plan_chat
from nemotron3.server.chat_bodies import ChatBody
from nemotron3.server.completion_bodies import CompletionBody, DetokenizeBody, TokenizeBody
from nemotron3.server.completions import CompletionAnswer, completion_prompts, plan_completion
from nemotron3.server.gate import Gate
from nemotron3.server.metrics import CONTENT_TYPE, ServerMetrics
from nemotron3.server.origins import assert_origins, opened
from nemotron3.server.refusals import RefusedError, failed, invalid, refusal_of
from nemotron3.server.response_store import ResponseStore
from nemotron3.server.responses import ResponseAnswer, conversation, plan_response
from nemotron3.server.responses_bodies import ResponsesBody
from nemotron3.server.streaming import EventStream, answered, submitted
from nemotron3.server.tokenizing import detokenize, tokenize

_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in {
        400: "The request asks for what cannot be.",
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

_IS_BRANCH = re.compile(r"(str|int|float|bool|list|dict|literal)(\[.*\])?|[A-Z]\w*", re.DOTALL)
"""What pydantic adds to the place of an error where a field may be of several types."""

_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What belongs to the server alone; the engine has its own configuration."""

    served_model_name: str | None = None
    """Name in `model`; None for the model's own."""
    api_key: str | None = field(default=None, repr=False)
    """Key that clients send; None to let everyone in."""
    max_body_bytes: int = 32 * 2**20
    """Largest body of a request."""
    allowed_origins: tuple[str, ...] = ()
    """Origins whose pages may use the server from a browser; ("*",) for all."""
    reasoning_grace: int = 0
    """Tokens beyond a reasoning budget in which a line end is waited for, where a request does not
    say; 0 leaves budgets exact, 500 is the model card's rule."""

    def __post_init__(self) -> None:
        assert_origins(self.allowed_origins)
        SamplingParams(reasoning_grace=self.reasoning_grace)


@dataclass(frozen=True, kw_only=True)
class Server:
    """The application as an ASGI server runs it, and what an end of it needs."""

    app: App
    gate: Gate
    llm: AsyncLLM
    api: FastAPI


def create_app(llm: AsyncLLM, settings: ServerSettings) -> Server:
    """The whole server around an engine; a ConfigError where it has no tokenizer."""
    _ = llm.tokenizer
    gate = Gate()
    metrics = ServerMetrics(llm.stats)
    desk = Desk(
        llm=llm,
        metrics=metrics,
        model_name=settings.served_model_name or llm.model_name,
        defaults={"reasoning_grace": settings.reasoning_grace, **llm.defaults.sampling},
    )
    api = FastAPI(
        title="nemotron3",
        description="Nemotron 3 models, in OpenAI's shapes.",
        docs_url=None,  # its pages fetch from elsewhere
        redoc_url=None,
    )
    _add_errors(api)
    _add_pages(api, desk, gate)
    _add_models(api, desk)
    _add_generation(api, desk)
    _add_responses(api, desk)
    app = Border(
        cast(App, api),
        gate=gate,
        metrics=metrics,
        api_key=settings.api_key,
        max_body_bytes=settings.max_body_bytes,
    )
    app = opened(app, settings.allowed_origins)
    return Server(app=app, gate=gate, llm=llm, api=api)


def _add_pages(api: FastAPI, desk: Desk, gate: Gate) -> None:
    page = (files("nemotron3.server") / "page.html").read_text(encoding="utf-8")

    @api.get("/", include_in_schema=False)
    @api.head("/", include_in_schema=False)
    async def chat_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY})

    @api.get("/health")
    @api.head("/health", include_in_schema=False)
    async def health() -> JSONResponse:
        """200 while requests are taken, 503 while they are not."""
        if not desk.llm.is_alive:
            return JSONResponse({"status": "failed"}, 503)
        if not gate.is_open:
            return JSONResponse({"status": "draining"}, 503, headers={"Retry-After": "5"})
        return JSONResponse({"status": "ok"})

    @api.get("/metrics")
    async def metrics() -> Response:
        """Counts and latencies for Prometheus."""
        return Response(desk.metrics.page(), headers={"Content-Type": CONTENT_TYPE})


def _add_models(api: FastAPI, desk: Desk) -> None:
    def card() -> dict[str, Any]:
        return {
            "id": desk.model_name,
            "object": "model",
            "created": desk.created,
            "owned_by": "nemotron3",
            "root": desk.model_name,
            "parent": None,
            "max_model_len": desk.llm.max_model_len,
        }

    @api.get("/v1/models")
    async def models() -> JSONResponse:
        """The one model of this server."""
        return JSONResponse({"object": "list", "data": [card()]})

    @api.get("/v1/models/{model:path}", responses=_REFUSALS)
    async def model(model: str) -> JSONResponse:
        """A model by its name."""
        desk.assert_serves(model)
        return JSONResponse(card())


def _add_generation(api: FastAPI, desk: Desk) -> None:
    @api.post("/v1/chat/completions", responses=_REFUSALS)
    async def chat(body: ChatBody, request: Request) -> Response:
        """Go on with a conversation."""
        desk.assert_serves(body.model)
        plan = plan_chat(body, desk.llm.tokenizer.tool_call_end_id, desk.defaults)
        prompt = await desk.prepare_chat(plan)
        job = desk.submit(prompt, plan.params, request.state.notes)
        answering = await submitted(request, job)
        answer = ChatAnswer(desk, body, plan, prompt, answering)
        if body.stream:
            return EventStream(answer.events(), answering.stop)
        return JSONResponse(await answered(request, answer.whole(), answering.stop))

    @api.post("/v1/completions", responses=_REFUSALS)
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Go on with texts."""
        desk.assert_serves(body.model)
        params = plan_completion(body, desk.defaults)
        prompts = await completion_prompts(desk, body)
        job = desk.submit_all(prompts, params, request.state.notes)
        answerings = await submitted(request, job)
        answer = CompletionAnswer(desk, body, params, answerings)
        if body.stream:
            return EventStream(answer.events(), answer.stop)
        return JSONResponse(await answered(request, answer.whole(), answer.stop))

    @api.post("/tokenize", responses=_REFUSALS)
    async def to_tokens(body: TokenizeBody) -> JSONResponse:
        """Cut a text or a conversation into tokens."""
        desk.assert_serves(body.model)
        return JSONResponse(await tokenize(desk, body))

    @api.post("/detokenize", responses=_REFUSALS)
    async def to_text(body: DetokenizeBody) -> JSONResponse:
        """Put tokens together again."""
        desk.assert_serves(body.model)
        return JSONResponse(detokenize(desk, body))


def _add_responses(api: FastAPI, desk: Desk) -> None:
    store = ResponseStore()

    @api.post("/v1/responses", responses=_REFUSALS)
    async def create(body: ResponsesBody, request: Request) -> Response:
        """Answer items."""
        desk.assert_serves(body.model)
        items = conversation(body, store)
        plan = plan_response(body, items, desk.llm.tokenizer.tool_call_end_id, desk.defaults)
        prompt = await desk.prepare_chat(plan)
        job = desk.submit(prompt, plan.params, request.state.notes)
        answering = await submitted(request, job)
        answer = ResponseAnswer(desk, body, plan, items, answering, store)
        if body.stream:
            return EventStream(answer.events(), answering.stop)
        return JSONResponse(await answered(request, answer.whole(), answering.stop))

    @api.get("/v1/responses/{response_id}", responses=_REFUSALS)
    async def retrieve(response_id: str) -> JSONResponse:
        """A response that is stored."""
        return JSONResponse(store.get(response_id, "response_id").body)

    @api.delete("/v1/responses/{response_id}", responses=_REFUSALS)
    async def delete(response_id: str) -> JSONResponse:
        """Forget a response."""
        store.delete(response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})


def _add_errors(api: FastAPI) -> None:
    @api.exception_handler(RequestValidationError)
    async def invalid_body(_: Request, error: RequestValidationError) -> Response:
        return _answer(_refusal_of_validation(error))

    @api.exception_handler(RefusedError)
    @api.exception_handler(Nemotron3Error)
    async def refused(_: Request, error: Exception) -> Response:
        found = refusal_of(error)
        if found is None:
            raise error
        return _answer(found)

    @api.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        # The border, outside of the framework, sees the error too and logs it.
        del error
        return _answer(failed(request.state.request_id))

    @api.exception_handler(HTTPException)
    async def no_such_thing(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.url.path}"
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        headers = dict(error.headers or {})
        return _answer(
            RefusedError(error.status_code, f"{where}: {error.detail}", code=code, headers=headers)
        )


def _answer(refused: RefusedError) -> Response:
    return JSONResponse(refused.body(), refused.status, headers=dict(refused.headers))


def _refusal_of_validation(error: RequestValidationError) -> RefusedError:
    """The first thing that is wrong with a body, in a sentence that names it."""
    found = cast(Mapping[str, Any], error.errors()[0])
    place = [str(part) for part in found["loc"][1:] if not _IS_BRANCH.fullmatch(str(part))]
    param = ".".join(place) or None
    given = found.get("input")
    match found["type"]:
        case "extra_forbidden":
            message = f"{param} is unknown here; check its spelling, or leave it out"
        case "missing":
            message = f"{param or 'the body'} is missing; it is required"
        case "unsupported":
            context: Mapping[str, Any] = found["ctx"]
            param = ".".join([*place, context["param"]])
            message = f"{param} is not supported; {context['remedy']}"
        case _:
            shown = repr(given) if len(repr(given)) < 100 else f"of type {type(given).__name__}"
            said = str(found["msg"])
            message = f"{param or 'the body'} is {shown}: {said[:1].lower()}{said[1:]}"
    return invalid(message, param)
