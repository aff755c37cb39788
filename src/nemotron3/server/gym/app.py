"""The application: an environment's tasks are seeded, its tools called, its answers verified.

    server = create_gym_app(load_environment("calculator"), GymSettings())
    serve(server, bind("127.0.0.1", 8001), drain_timeout_s=5)

Agents of NeMo Gym, and whoever speaks as they do, play rollouts on it: `POST /seed_session` with a
row, `POST /{tool}` with arguments, `POST /verify` with the row and the response. What a tool says
is plain text, the same that our own rollouts read, so a policy sees no difference.

Errors have the shape of FastAPI's, which NeMo Gym's servers have: `{"detail": ...}`, and 422 with
the place of what is wrong for a body that is none. A judge or a tool that fails is no such error:
the verification says `_ng_failure_class`, and NeMo Gym puts the rollout aside.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic_core import from_json, to_json
from starlette.exceptions import HTTPException

from nemotron3.environments.environment import ERROR, Environment
from nemotron3.environments.gym_protocol import (
    AGGREGATE_METRICS,
    RESERVED,
    SEED_SESSION,
    VERIFY,
    read_response,
    write_verification,
)
from nemotron3.environments.rows import prompt_of
from nemotron3.environments.verification import RolloutFailedError, Verification
from nemotron3.errors import ConfigError, DataError, InvalidValueError, OverloadedError
from nemotron3.server.gym.aggregation import aggregate_metrics
from nemotron3.server.gym.cookies import COOKIE, session_cookie, with_cookies_again
from nemotron3.server.gym.sessions import ServedSession, SessionStore
from nemotron3.server.http.drain import InFlightRequests
from nemotron3.server.http.metrics import CONTENT_TYPE, RequestMetrics
from nemotron3.server.http.middleware import App, RequestMiddleware

_RETRY_AFTER_S = 5
_JSON = "application/json"


@dataclass(frozen=True, kw_only=True)
class GymSettings:
    """Limits of the server."""

    max_sessions: int = 4096
    """Rollouts that are kept at the same time."""
    session_expiry_s: float = 3600.0
    """Seconds without a request after which a rollout's session is dropped."""
    max_body_bytes: int = 32 * 2**20
    """Largest body of a request."""


@dataclass(frozen=True, kw_only=True)
class GymServer:
    """The application for an ASGI server, with the parts that a graceful shutdown needs."""

    app: App
    in_flight: InFlightRequests
    sessions: SessionStore

    def close(self) -> None:
        """Nothing runs beside the requests."""


def create_gym_app(environment: Environment, settings: GymSettings) -> GymServer:
    """Build the server of an environment; `ConfigError` for one that cannot be served."""
    _assert_servable(environment)
    in_flight, metrics = InFlightRequests(), RequestMetrics()
    sessions = SessionStore(max_sessions=settings.max_sessions, expiry_s=settings.session_expiry_s)
    api = FastAPI(
        title=environment.name,
        description="An environment of nemotron3, as a resources server of NeMo Gym.",
        docs_url=None,  # its pages fetch from elsewhere
        redoc_url=None,
    )
    _add_errors(api)
    _add_information(api, environment, sessions, metrics)
    _add_rollouts(api, environment, sessions)
    app = RequestMiddleware(
        cast(App, api),
        in_flight=in_flight,
        metrics=metrics,
        api_key=None,
        max_body_bytes=settings.max_body_bytes,
    )
    return GymServer(app=with_cookies_again(app), in_flight=in_flight, sessions=sessions)


def _add_information(
    api: FastAPI, environment: Environment, sessions: SessionStore, metrics: RequestMetrics
) -> None:
    @api.get("/")
    @api.get("/health")
    async def health() -> JSONResponse:
        """What is served, while requests are accepted."""
        return JSONResponse(
            {
                "status": "ok",
                "environment": environment.name,
                "difficulty": environment.difficulty,
                "tools": [tool.name for tool in environment.tools],
                "sessions": len(sessions),
            }
        )

    @api.get("/metrics")
    async def counts() -> Response:
        """Requests by address, in the text format of Prometheus."""
        return Response(metrics.page(), headers={"Content-Type": CONTENT_TYPE})

    @api.get("/reverify_mode")
    async def reverify_mode() -> JSONResponse:
        """Whether stored responses can be verified again without their sessions."""
        return JSONResponse("unsupported" if _has_sessions(environment) else "stateless")

    @api.post(f"/{AGGREGATE_METRICS}")
    async def aggregated(request: Request) -> JSONResponse:
        """Statistics of verified rollouts."""
        body = await _object(request)
        verified: Any = body.get("verify_responses")
        if not isinstance(verified, list):
            raise DataError("is no list of verified rollouts", field="verify_responses")
        for place, each in enumerate(cast(list[Any], verified)):
            if not isinstance(each, Mapping):
                raise DataError("is no object", field=f"verify_responses[{place}]")
        return JSONResponse(aggregate_metrics(cast(list[Mapping[str, Any]], verified)))


def _add_rollouts(api: FastAPI, environment: Environment, sessions: SessionStore) -> None:
    @api.post(f"/{SEED_SESSION}")
    async def seed_session(request: Request) -> JSONResponse:
        """Begin a rollout of a row."""
        row = await _object(request)
        prompt_of(row)  # a body that is no row is told now and not when the rollout is over
        sessions.assert_room()
        try:
            state = await environment.seed_session(row)
        except RolloutFailedError as error:
            raise _unavailable(str(error)) from error
        answer = JSONResponse({})
        answer.headers["Set-Cookie"] = session_cookie(sessions.add(state))
        return answer

    @api.post(f"/{VERIFY}")
    async def verify(request: Request) -> Response:
        """Judge a response to a row."""
        body = await _object(request)
        response = read_response(body)
        session = sessions.get(request.cookies.get(COOKIE))
        if session is None and _has_sessions(environment):
            raise _no_session()
        if session is None:
            session = ServedSession(await environment.seed_session(body), 0.0)
        async with session.turn:
            verification = await _verification(environment, body, response, session)
        session.is_verified = True
        return Response(to_json(write_verification(body, verification)), media_type=_JSON)

    @api.post("/{tool}")
    async def call(tool: str, request: Request) -> Response:
        """Call a tool; the answer is what the policy reads."""
        session = sessions.get(request.cookies.get(COOKIE))
        if tool not in {each.name for each in environment.tools}:
            return PlainTextResponse(f"{ERROR}there is no tool {tool[:40]}", 404)
        arguments = await _object(request)
        if session is None:
            raise _no_session()
        async with session.turn:
            try:
                said = await environment.call_tool(session.state, tool, arguments)
            except RolloutFailedError as error:
                session.failure = error.failure
                raise _unavailable(str(error)) from error
        return PlainTextResponse(said)


async def _verification(
    environment: Environment, row: Mapping[str, Any], response: Any, session: ServedSession
) -> Verification:
    if session.failure is not None:
        return Verification(failure=session.failure)
    try:
        return await environment.verify(dict(row), response, session.state)
    except RolloutFailedError as error:
        return Verification(failure=error.failure)


async def _object(request: Request) -> dict[str, Any]:
    """The body of a request, which the middleware has found to be JSON."""
    body: Any = from_json(await request.body())
    if not isinstance(body, dict):
        raise DataError(f"is of type {type(body).__name__}, an object was expected", field="body")
    return cast(dict[str, Any], body)


def _add_errors(api: FastAPI) -> None:
    """Answer errors in the shape of FastAPI's own."""

    @api.exception_handler(InvalidValueError)
    async def invalid(_: Request, error: Exception) -> Response:
        field = error.field if isinstance(error, InvalidValueError) else None
        place = [] if field in (None, "body") else str(field).split(".")
        problem = {"type": "value_error", "loc": ["body", *place], "msg": str(error)}
        return JSONResponse({"detail": [problem]}, 422)

    @api.exception_handler(OverloadedError)
    async def overloaded(_: Request, error: Exception) -> Response:
        headers = {"Retry-After": str(_RETRY_AFTER_S)}
        return JSONResponse({"detail": str(error)}, 503, headers=headers)


def _unavailable(why: str) -> HTTPException:
    return HTTPException(500, f"this rollout has failed, and no reward is given: {why}")


def _no_session() -> HTTPException:
    return HTTPException(
        400,
        f"there is no session: call /{SEED_SESSION} first and send its cookie; sessions end when "
        "nobody has used them for a while",
    )


def _has_sessions(environment: Environment) -> bool:
    """Whether rollouts have a state."""
    return type(environment).seed_session is not Environment.seed_session


def _assert_servable(environment: Environment) -> None:
    kind = type(environment)
    if environment.compares_responses:
        raise ConfigError(
            f"environment {environment.name} judges the responses of a task together, and NeMo "
            "Gym's agents send them one by one; it can be trained on, and not be served"
        )
    if kind.step is not Environment.step:
        raise ConfigError(
            f"environment {environment.name} says something after a turn that calls no tool, where "
            "NeMo Gym's agents end; it can be trained on, and not be served"
        )
    if clash := [tool.name for tool in environment.tools if tool.name in RESERVED]:
        raise ConfigError(
            f"environment {environment.name} has a tool {clash[0]!r}, which is an address of the "
            "server itself; give the tool another name"
        )
