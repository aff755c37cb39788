"""The application: routes, their handlers, and the settings of the server.

    app = create_app(AsyncLLM("runs/tiny/model"), ServerSettings(served_model_name="tiny"))
    serve(app, bind("127.0.0.1", 8000), drain_timeout_s=60)

Each endpoint that generates has three steps: it makes a plan from the body, a prompt from the plan,
and an answer from the engine's output, complete or as a stream. A bad request is refused in the
first two steps or when it is submitted to the engine. The client therefore gets an HTTP status
instead of an error event in a stream.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import cast

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from nemotron3.errors import ConfigError
from nemotron3.inference.async_llm import AsyncLLM
from nemotron3.inference.requests import SamplingParams
from nemotron3.inference.served_adapters import ServedAdapter
from nemotron3.server.chat.answer import ChatAnswer
from nemotron3.server.chat.body import ChatBody
from nemotron3.server.chat.plan import plan_chat
from nemotron3.server.completions.answer import CompletionAnswer
from nemotron3.server.completions.body import CompletionBody
from nemotron3.server.completions.plan import completion_prompts, plan_completion
from nemotron3.server.generation.prompts import prepare_chat
from nemotron3.server.generation.serving import ServedContexts, ServingContext
from nemotron3.server.generation.token_ids import assert_routes
from nemotron3.server.http.cors import assert_origins, with_cors
from nemotron3.server.http.drain import InFlightRequests
from nemotron3.server.http.error_handlers import ERROR_RESPONSES, add_error_handlers
from nemotron3.server.http.metrics import CONTENT_TYPE, ServerMetrics
from nemotron3.server.http.middleware import App, RequestMiddleware
from nemotron3.server.http.streaming import EventStream, answered, submitted
from nemotron3.server.responses.answer import ResponseAnswer
from nemotron3.server.responses.body import ResponsesBody
from nemotron3.server.responses.plan import conversation, plan_response
from nemotron3.server.responses.store import ResponseStore
from nemotron3.server.tokenizing import DetokenizeBody, TokenizeBody, detokenize, tokenize
from nemotron3.server.weights import add_weights

_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of the server itself; those of the engine are in `EngineConfig`."""

    served_model_name: str | None = None
    """Name that clients send as `model`; None for the model's own name."""
    api_key: str | None = field(default=None, repr=False)
    """Key that clients must send; None accepts every client."""
    max_body_bytes: int = 32 * 2**20
    """Largest body of a request."""
    allowed_origins: tuple[str, ...] = ()
    """Web origins whose pages may call the server from a browser; ("*",) for all."""
    reasoning_grace: int = 0
    """Default of `reasoning_grace`: tokens beyond a reasoning budget in which reasoning may end its
    line. 0 makes budgets exact, 500 is the model card's rule."""

    weights_folder: Path | None = None
    """Folder of model directories from which clients may load weights; None allows no update.
    Requires an API key."""

    def __post_init__(self) -> None:
        assert_origins(self.allowed_origins)
        if self.weights_folder is not None and not self.api_key:
            raise ConfigError(
                f"is {str(self.weights_folder)!r} and there is no API key: whoever reaches the "
                "server could replace its model; set {other}",
                field="weights_folder",
                other="api_key",
            )
        if self.weights_folder is not None and not self.weights_folder.is_dir():
            raise ConfigError(
                f"is {str(self.weights_folder)!r}, which is no directory; make it",
                field="weights_folder",
            )
        SamplingParams(reasoning_grace=self.reasoning_grace)


@dataclass(frozen=True, kw_only=True)
class Server:
    """The application for an ASGI server, with the parts that a graceful shutdown needs."""

    app: App
    in_flight: InFlightRequests
    llm: AsyncLLM
    """The engine of the base model."""
    adapters: Mapping[str, ServedAdapter]
    api: FastAPI

    def close(self) -> None:
        """Abort what is unfinished, and end all engines."""
        for llm in _engines(self.llm, self.adapters):
            llm.close()


def create_app(
    llm: AsyncLLM, settings: ServerSettings, adapters: Mapping[str, ServedAdapter] | None = None
) -> Server:
    """Build the server around an engine, and around those of adapters of its model.

    Raises ConfigError if an engine has no tokenizer, two models have one name, or clients may
    replace weights that adapters share.
    """
    adapters = adapters or {}
    name = settings.served_model_name or llm.model_name
    check_adapters(name, settings, adapters)
    engines = _engines(llm, adapters)
    _ = [engine.tokenizer for engine in engines]
    in_flight = InFlightRequests()
    metrics = ServerMetrics(*(engine.stats for engine in engines))

    def context(
        engine: AsyncLLM, name: str, root: str, parent: str | None = None
    ) -> ServingContext:
        return ServingContext(
            llm=engine,
            metrics=metrics,
            model_name=name,
            defaults={"reasoning_grace": settings.reasoning_grace, **engine.defaults.sampling},
            root=root,
            parent=parent,
        )

    serving = ServedContexts(
        context(llm, name, name),
        [
            context(adapter.llm, each, str(adapter.directory), name)
            for each, adapter in adapters.items()
        ],
    )
    api = FastAPI(
        title="nemotron3",
        description="Nemotron 3 models, in OpenAI's shapes.",
        docs_url=None,  # its pages fetch from elsewhere
        redoc_url=None,
    )
    add_error_handlers(api)
    _add_pages(api, serving, in_flight)
    _add_models(api, serving)
    _add_generation(api, serving)
    _add_responses(api, serving)
    if settings.weights_folder is not None:
        add_weights(api, llm, settings.weights_folder)
    app = RequestMiddleware(
        cast(App, api),
        in_flight=in_flight,
        metrics=metrics,
        api_key=settings.api_key,
        max_body_bytes=settings.max_body_bytes,
    )
    app = with_cors(app, settings.allowed_origins)
    return Server(app=app, in_flight=in_flight, llm=llm, adapters=adapters, api=api)


def _engines(llm: AsyncLLM, adapters: Mapping[str, ServedAdapter]) -> list[AsyncLLM]:
    return [llm, *(adapter.llm for adapter in adapters.values())]


def check_adapters(name: str, settings: ServerSettings, adapters: Collection[str]) -> None:
    """Raise ConfigError for adapters that cannot be served beside a model of this `name`."""
    if name in adapters:
        raise ConfigError(
            f"has an adapter named {name!r}, and so is the model; give one of them another name",
            field="lora",
        )
    if adapters and settings.weights_folder is not None:
        raise ConfigError(
            f"is {str(settings.weights_folder)!r} and there are adapters, which share the model's "
            "weights: replacing these would change them too; serve without one of the two",
            field="weights_folder",
        )


def _add_pages(api: FastAPI, serving: ServedContexts, in_flight: InFlightRequests) -> None:
    page = (files("nemotron3.server") / "page.html").read_text(encoding="utf-8")

    @api.get("/", include_in_schema=False)
    @api.head("/", include_in_schema=False)
    async def chat_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY})

    @api.get("/health")
    @api.head("/health", include_in_schema=False)
    async def health() -> JSONResponse:
        """200 while requests are accepted, 503 while draining or after a failure."""
        if not all(context.llm.is_alive for context in serving.all):
            return JSONResponse({"status": "failed"}, 503)
        if not in_flight.is_accepting:
            return JSONResponse({"status": "draining"}, 503, headers={"Retry-After": "5"})
        return JSONResponse({"status": "ok"})

    @api.get("/metrics")
    async def metrics() -> Response:
        """Metrics in the text format of Prometheus."""
        return Response(serving.all[0].metrics.page(), headers={"Content-Type": CONTENT_TYPE})


def _add_models(api: FastAPI, serving: ServedContexts) -> None:
    @api.get("/v1/models")
    async def models() -> JSONResponse:
        """List the model of this server and its adapters."""
        cards = [context.card() for context in serving.all]
        return JSONResponse({"object": "list", "data": cards})

    @api.get("/v1/models/{model:path}", responses=ERROR_RESPONSES)
    async def model(model: str) -> JSONResponse:
        """Describe a model by its name."""
        return JSONResponse(serving.named(model).card())


def _add_generation(api: FastAPI, serving: ServedContexts) -> None:
    @api.post("/v1/chat/completions", responses=ERROR_RESPONSES)
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        served = _served(serving, body)
        plan = plan_chat(body, served.llm.tokenizer.tool_call_end_id, served.defaults)
        prompt = await prepare_chat(served.llm, plan)
        job = served.submit(prompt, plan.params, request.state.notes)
        handle = await submitted(request, job)
        answer = ChatAnswer(served, body, plan, prompt, handle)
        if body.stream:
            return EventStream(answer.events(), handle.stop)
        return JSONResponse(await answered(request, answer.whole(), handle.stop))

    @api.post("/v1/completions", responses=ERROR_RESPONSES)
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue texts."""
        served = _served(serving, body)
        params = plan_completion(body, served.defaults)
        prompts = await completion_prompts(served, body)
        job = served.submit_all(prompts, params, request.state.notes)
        handles = await submitted(request, job)
        answer = CompletionAnswer(served, body, params, handles)
        if body.stream:
            return EventStream(answer.events(), answer.stop)
        return JSONResponse(await answered(request, answer.whole(), answer.stop))

    @api.post("/tokenize", responses=ERROR_RESPONSES)
    async def to_tokens(body: TokenizeBody) -> JSONResponse:
        """Tokenize a text or a conversation."""
        served = serving.named(body.model)
        return JSONResponse(await tokenize(served, body))

    @api.post("/detokenize", responses=ERROR_RESPONSES)
    async def to_text(body: DetokenizeBody) -> JSONResponse:
        """Decode token ids into text."""
        served = serving.named(body.model)
        return JSONResponse(detokenize(served, body))


def _served(
    serving: ServedContexts, body: ChatBody | CompletionBody | ResponsesBody
) -> ServingContext:
    """The model that a request names; refuse another one, and what this server does not record."""
    served = serving.named(body.model)
    assert_routes(
        is_wanted=body.return_routed_experts,
        are_recorded=served.llm.returns_routed_experts,
        is_stream=body.stream,
    )
    return served


def _add_responses(api: FastAPI, serving: ServedContexts) -> None:
    store = ResponseStore()

    @api.post("/v1/responses", responses=ERROR_RESPONSES)
    async def create(body: ResponsesBody, request: Request) -> Response:
        """Answer a list of items."""
        served = _served(serving, body)
        items = conversation(body, store)
        plan = plan_response(body, items, served.llm.tokenizer.tool_call_end_id, served.defaults)
        prompt = await prepare_chat(served.llm, plan)
        job = served.submit(prompt, plan.params, request.state.notes)
        handle = await submitted(request, job)
        answer = ResponseAnswer(served, body, plan, items, handle, store)
        if body.stream:
            return EventStream(answer.events(), handle.stop)
        return JSONResponse(await answered(request, answer.whole(), handle.stop))

    @api.get("/v1/responses/{response_id}", responses=ERROR_RESPONSES)
    async def retrieve(response_id: str) -> JSONResponse:
        """Return a stored response."""
        return JSONResponse(store.get(response_id, "response_id").body)

    @api.delete("/v1/responses/{response_id}", responses=ERROR_RESPONSES)
    async def delete(response_id: str) -> JSONResponse:
        """Delete a stored response."""
        store.delete(response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})
