"""Pages of other origins: which ones a browser allows, and which headers they may read."""

import pytest

from nemotron3.errors import ConfigError
from nemotron3.server.app import ServerSettings
from tests.server.serving import running

HERE, THERE = "https://chat.example.org", "https://evil.example"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def opened(model_folder):
    with running(model_folder, api_key="sesame", allowed_origins=(HERE,)) as server:
        yield server


def asked_beforehand(server, origin):
    """A browser's preflight request for a request to `/v1`."""
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    return server.send("OPTIONS", CHAT, headers=headers)


def test_a_page_that_is_named_may_ask_and_read(opened):
    allowed = asked_beforehand(opened, HERE)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == HERE
    assert "POST" in allowed.headers["access-control-allow-methods"]
    assert "authorization" in allowed.headers["access-control-allow-headers"]
    headers = {"Origin": HERE, "Authorization": "Bearer sesame"}
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    for stream in (False, True):
        answer = opened.post(CHAT, body | {"stream": stream}, headers=headers)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == HERE
        assert "x-request-id" in answer.headers["access-control-expose-headers"]


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [(CHAT, {}, 401), (CHAT, {"Authorization": "Bearer sesame"}, 400), ("/nowhere", {}, 401)],
)
def test_a_page_that_is_named_can_read_why_it_was_refused(opened, path, headers, status):
    refused = opened.post(path, {"messages": []}, headers={"Origin": HERE} | headers)
    assert refused.status_code == status
    assert refused.headers["access-control-allow-origin"] == HERE


def test_another_page_may_not(opened):
    assert asked_beforehand(opened, THERE).status_code == 400
    for answer in (
        asked_beforehand(opened, THERE),
        opened.get("/health", headers={"Origin": THERE}),
    ):
        assert "access-control-allow-origin" not in answer.headers


def test_by_default_no_page_may(served):
    for answer in (asked_beforehand(served, HERE), served.get("/health", headers={"Origin": HERE})):
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_everyone_may_be_let_in(model_folder):
    with running(model_folder, allowed_origins=("*",)) as server:
        assert asked_beforehand(server, THERE).headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize(
    "origins",
    ["https://a.example/", "a.example", "https://A.example", "https://a.example:443", "null",
     "http://a.example:80", "https://a.example/chat", "https://me@a.example", ""],
)  # fmt: skip
def test_what_no_browser_calls_an_origin_is_refused(origins):
    with pytest.raises(ConfigError, match=r"allowed_origins has .* as browsers do"):
        ServerSettings(allowed_origins=("http://localhost:3000", origins))


def test_everyone_and_someone_is_refused():
    with pytest.raises(ConfigError, match="allows the others as well"):
        ServerSettings(allowed_origins=("*", HERE))
