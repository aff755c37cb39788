"""The middleware of every request: ids, keys, bodies, draining, and unexpected errors."""

import asyncio
import json
import logging

import pytest

from nemotron3.errors import ConfigError, OverloadedError
from nemotron3.inference.engine import EngineStats
from nemotron3.server.http.drain import InFlightRequests
from nemotron3.server.http.logs import JsonLines, TextLines
from nemotron3.server.http.metrics import ServerMetrics
from nemotron3.server.http.middleware import RequestMiddleware

KEY = "sesame"
JSON = {"content-type": "application/json"}


async def echo(scope, receive, send):
    """An application that gives back what it was sent."""
    body = (await receive()).get("body", b"") if scope["method"] == "POST" else b""
    scope["state"]["notes"]["seen"] = len(body)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def failing(error):
    async def app(scope, receive, send):
        raise error

    return app


class Exchange:
    """One request to the middleware, and what came back."""

    def __init__(
        self, middleware, *, path="/v1/models", method="GET", headers=None, body=b"", stalls=False
    ):
        scope = {
            "type": "http",
            "path": path,
            "method": method,
            "headers": [(k.encode(), v.encode()) for k, v in (headers or {}).items()],
        }
        parts = [body[i : i + 10] for i in range(0, len(body), 10)] or [b""]
        self.sent = []

        async def receive():
            if stalls and not parts:
                await asyncio.sleep(60)
            part = parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": stalls or bool(parts)}

        async def send(message):
            self.sent.append(message)

        asyncio.run(middleware(scope, receive, send))
        self.status = self.sent[0]["status"]
        self.headers = {k.decode(): v.decode() for k, v in self.sent[0]["headers"]}
        self.body = b"".join(message.get("body", b"") for message in self.sent[1:])

    @property
    def error(self):
        return json.loads(self.body)["error"]


@pytest.fixture
def metrics():
    return ServerMetrics(EngineStats)


@pytest.fixture
def middleware(metrics):
    def make(app=echo, *, in_flight=None, key=None, most=1000):
        in_flight = in_flight if in_flight is not None else InFlightRequests()
        return RequestMiddleware(
            app, in_flight=in_flight, metrics=metrics, api_key=key, max_body_bytes=most
        )

    return make


def test_a_request_keeps_the_id_it_came_with(middleware):
    done = Exchange(middleware(), headers={"x-request-id": "mine-7"})
    assert done.headers["x-request-id"] == "mine-7"


@pytest.mark.parametrize("given", [None, "", "with space", "é", "x" * 129])
def test_a_request_gets_an_id_where_it_brings_no_usable_one(middleware, given):
    headers = {} if given is None else {"x-request-id": given}
    made = Exchange(middleware(), headers=headers).headers["x-request-id"]
    assert len(made) == 32
    assert made != Exchange(middleware(), headers=headers).headers["x-request-id"]


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        ("Bearer other", 401),
        (f"Basic {KEY}", 401),
        (f"Bearer {KEY}x", 401),
        (f"Bearer {KEY}", 200),
        (f"bearer  {KEY} ", 200),
    ],
)
def test_the_key_opens_and_nothing_else_does(middleware, authorization, status):
    headers = {} if authorization is None else {"authorization": authorization}
    done = Exchange(middleware(key=KEY), headers=headers)
    assert done.status == status
    if status == 401:
        assert done.error["code"] == "invalid_api_key"
        assert "Authorization: Bearer KEY" in done.error["message"]
        assert KEY not in done.body.decode()


@pytest.mark.parametrize("path", ["/", "/health"])
def test_the_page_and_the_probe_need_no_key(middleware, path):
    assert Exchange(middleware(key=KEY), path=path).status == 200


def test_bodies_of_many_pieces_arrive_whole(middleware):
    body = json.dumps({"text": "é" * 50}).encode()
    assert Exchange(middleware(), method="POST", headers=JSON, body=body).body == body


@pytest.mark.parametrize("announces", [True, False])
def test_a_body_beyond_the_limit_is_refused_whether_it_says_so_or_not(middleware, announces):
    body = b'"' + b"x" * 1000 + b'"'
    headers = JSON | ({"content-length": str(len(body))} if announces else {})
    done = Exchange(middleware(), method="POST", headers=headers, body=body)
    assert done.status == 413
    assert "1,000 bytes" in done.error["message"]
    assert "--max-body-mib" in done.error["message"]


def test_a_body_that_does_not_come_is_not_waited_for(middleware, monkeypatch):
    monkeypatch.setattr("nemotron3.server.http.middleware._BODY_TIMEOUT_S", 0.05)
    in_flight = InFlightRequests()
    done = Exchange(
        middleware(in_flight=in_flight), method="POST", headers=JSON, body=b"{", stalls=True
    )
    assert done.status == 408
    assert done.headers["connection"] == "close"
    assert in_flight.count == 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"{'a': 1}",
        b'{"a": NaN}',
        b'{"a": 1} x',
        b"\xff\xfe",
        b'{"a": "\xff"}',
        b'{"a": "\\ud800"}',
        b"[" * 900,
    ],
)
def test_what_is_not_json_is_refused(middleware, body):
    done = Exchange(middleware(), method="POST", headers=JSON, body=body)
    assert done.status == 400
    assert done.error["code"] == "invalid_json"
    assert done.error["type"] == "invalid_request_error"


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_that_does_not_say_it_is_json_is_refused(middleware, kind):
    headers = {} if kind is None else {"content-type": kind}
    done = Exchange(middleware(), method="POST", headers=headers, body=b"{}")
    assert done.status == 415
    assert "Content-Type: application/json" in done.error["message"]


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "APPLICATION/JSON"])
def test_json_may_be_said_in_several_ways(middleware, kind):
    done = Exchange(middleware(), method="POST", headers={"content-type": kind}, body=b"{}")
    assert done.status == 200


def test_a_draining_server_sends_work_elsewhere_and_still_answers_probes(middleware):
    in_flight = InFlightRequests()
    in_flight.stop_accepting()
    done = Exchange(middleware(in_flight=in_flight), method="POST", headers=JSON, body=b"{}")
    assert done.status == 503
    assert done.headers["retry-after"] == "5"
    assert done.error["code"] == "draining"
    assert Exchange(middleware(in_flight=in_flight), path="/metrics").status == 200


def test_it_is_known_when_no_request_is_in_flight():
    async def scenario():
        in_flight = InFlightRequests()
        assert await in_flight.wait_empty(0.01)
        with in_flight.track():
            in_flight.stop_accepting()
            assert not await in_flight.wait_empty(0.01)
            assert in_flight.count == 1
        assert await in_flight.wait_empty(0.01)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ConfigError("is 3; it must be at most 1", field="top_p"), 400, "top_p is 3"),
        (OverloadedError("8 wait; try again later"), 429, "8 wait"),
        (RuntimeError("secret place"), 500, "its log says why"),
    ],
)
def test_an_error_is_an_answer_in_openais_shape(middleware, caplog, error, status, said):
    done = Exchange(middleware(failing(error)), headers={"x-request-id": "mine"})
    assert done.status == status
    assert said in done.error["message"]
    assert set(done.error) == {"message", "type", "param", "code"}
    if status == 500:
        assert "secret" not in done.body.decode()
        assert "mine" in done.error["message"]
        assert "secret place" in caplog.text
    if status == 429:
        assert done.headers["retry-after"] == "1"
    if status == 400:
        assert done.error["param"] == "top_p"


def test_every_request_is_logged_once_with_its_facts(middleware, caplog):
    with caplog.at_level(logging.INFO, "nemotron3.server.access"):
        Exchange(middleware(), method="POST", headers=JSON | {"x-request-id": "a"}, body=b"{}")
        Exchange(middleware(key=KEY), headers={"x-request-id": "b"})
    records = [json.loads(JsonLines().format(record)) for record in caplog.records]
    assert [(r["request_id"], r["status"], r["method"]) for r in records] == [
        ("a", 200, "POST"),
        ("b", 401, "GET"),
    ]
    assert records[0]["seen"] == 2
    assert records[0]["duration_ms"] >= 0
    assert "request_id=a" in TextLines().format(caplog.records[0])


def test_every_request_is_counted(middleware, metrics):
    Exchange(middleware())
    Exchange(middleware(key=KEY))
    page = metrics.page().decode()
    assert 'nemotron3_http_requests_total{path="unknown",status="200"} 1.0' in page
    assert 'nemotron3_http_requests_total{path="unknown",status="401"} 1.0' in page
    assert "nemotron3_requests_running 0.0" in page
