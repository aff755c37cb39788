"""The server's descriptions of itself, and its answers to impossible requests."""

import json
import logging
import socket
import time

import pytest
from openai import AuthenticationError, NotFoundError, OpenAI

from nemotron3.server.http.logs import JsonLines
from tests.server.serving import MODEL, running

HELLO = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"
THREE = {"messages": HELLO, "max_tokens": 3, "ignore_eos": True}
BAD_CHATS = {
    "no messages": ({"messages": []}, "messages"),
    "messages left out": ({"messages": None}, "messages"),
    "a message without a role": ({"messages": [{"content": "x"}]}, "messages[0].role"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content[0].type",
    ),
    "a call that is no JSON": (
        {
            "messages": [
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}
            ]
        },
        "messages[0].tool_calls[0].function.arguments",
    ),
    "a tool's answer to nothing": ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
    "a hot temperature": ({"temperature": 101}, "temperature"),
    "a word for a temperature": ({"temperature": "hot"}, "temperature"),
    "no probability": ({"top_p": 0}, "top_p"),
    "a negative top_k": ({"top_k": -2}, "top_k"),
    "no answers": ({"n": 0}, "n"),
    "too many answers": ({"n": 10**6}, "n"),
    "no tokens": ({"max_tokens": 0}, "max_tokens"),
    "more tokens than the context": ({"max_tokens": 5000}, "max_tokens"),
    "more tokens than a number": ({"max_completion_tokens": 10**40}, "max_completion_tokens"),
    "a negative budget": ({"reasoning_budget": -1}, "reasoning_budget"),
    "too many alternatives": ({"logprobs": True, "top_logprobs": 1000}, "top_logprobs"),
    "no tokens by another name": ({"max_completion_tokens": 0}, "max_completion_tokens"),
    "a negative budget by vLLM's name": ({"thinking_token_budget": -1}, "thinking_token_budget"),
    "an argument that no call can name": (
        {"tools": [{"name": "f", "parameters": {"properties": {}, "required": ["c>d"]}}]},
        "tools[0].parameters.required",
    ),
    "required arguments that are no list": (
        {"tools": [{"name": "f", "parameters": {"required": "a"}}]},
        "tools[0].parameters.required",
    ),
    "a choice of tools that is none": ({"tool_choice": "any"}, "tool_choice"),
    "a stop that is no text": ({"stop": [1]}, "stop"),
    "no choices": ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    "a parameter that no call can name": (
        {"tools": [{"name": "f", "parameters": {"properties": {"a>b": {}}}}]},
        "tools[0].parameters.properties",
    ),
    "a bias for no token": ({"logit_bias": {"99999999999": 1}}, "logit_bias"),
    "a token that is none": ({"stop_token_ids": [10**9]}, "stop_token_ids"),
    "a negative token": ({"stop_token_ids": [-5]}, "stop_token_ids"),
    "an empty stop": ({"stop": ""}, "stop"),
    "an effort of other models": ({"reasoning_effort": "low"}, "reasoning_effort"),
    "a broken expression": ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
    "a broken grammar": (
        {"structured_outputs": {"grammar": "start: nowhere"}},
        "structured_outputs.grammar",
    ),
    "a broken schema": (
        {"structured_outputs": {"json": {"type": "nothing"}}},
        "structured_outputs.json",
    ),
    "a schema that is no JSON": ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    "a form without an end": (
        {"structured_outputs": {"regex": "a"}, "ignore_eos": True},
        "structured_outputs.regex",
    ),
    "an unknown name": ({"temprature": 1}, "temprature"),
    "an unknown name inside": (
        {"chat_template_kwargs": {"enable_thinkin": True}},
        "chat_template_kwargs.enable_thinkin",
    ),
    "a name of long ago": ({"functions": []}, "functions"),
    "a prompt that is too long": (
        {"messages": [{"role": "user", "content": "x " * 4096}]},
        "messages",
    ),
    "a prompt that is far too long": (
        {"messages": [{"role": "user", "content": "x" * 2_000_000}]},
        "messages",
    ),
    "a final message to go on with that is not there": ({"continue_final_message": True}, None),
}


@pytest.mark.parametrize(("given", "param"), BAD_CHATS.values(), ids=BAD_CHATS.keys())
def test_a_chat_that_cannot_be_is_refused_by_name(served, given, param):
    answer = served.post(CHAT, {"messages": HELLO, "max_tokens": 2} | given)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 2000
    if param is not None:
        assert error["param"] is not None, error
        assert error["param"].startswith(param), error


def test_a_refused_stream_is_a_status_and_no_event(served):
    answer = served.post(CHAT, {"messages": HELLO, "stream": True, "n": 0})
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("path", "begins"),
    [(CHAT, {"messages": HELLO}), ("/v1/completions", {"prompt": "Hello"}),
     ("/v1/responses", {"input": "Hello"})],
)  # fmt: skip
def test_a_stream_in_a_form_that_cannot_be_is_a_status_too(served, path, begins):
    answer = served.post(path, begins | {"stream": True, "structured_outputs": {"regex": "("}})
    assert answer.status_code == 400
    assert "structured_outputs.regex cannot be enforced" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"null", 400),
        (b'"messages"', 400),
        (b"\xff\xfe{}", 400),
        (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', 400),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', 400),
        (b'{"messages": ' + b"[" * 5000, 400),
    ],
)
def test_bodies_that_are_no_requests(served, body, status):
    headers = {"content-type": "application/json"}
    answer = served.post(CHAT, content=body, headers=headers)
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_half_a_request_disturbs_nobody(served):
    host, port = served.url.removeprefix("http://").split(":")
    for half in (b"POST " + CHAT.encode(), b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01"):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(half)
    assert served.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("get", "/v1/nothing", 404),
        ("get", CHAT, 405),
        ("get", "/v1/models/other", 404),
        ("get", "/v1/responses/resp_x", 404),
    ],
)
def test_other_addresses_are_refused_in_the_same_shape(served, method, path, status):
    answer = getattr(served, method)(path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_the_model_is_listed_and_no_other_answers(client):
    (card,) = client.models.list().data
    assert card.id == MODEL
    assert card.max_model_len == 4096
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(NotFoundError, match="this server has 'tiny'"):
        client.chat.completions.create(model="gpt", messages=HELLO)


def test_a_request_keeps_its_id_to_the_end(served):
    headers = {"x-request-id": "mine-1"}
    for body in ({"messages": HELLO, "max_tokens": 1}, {}):
        answer = served.post(CHAT, body, headers=headers)
        assert answer.headers["x-request-id"] == "mine-1"


def test_the_log_tells_a_request_with_its_tokens(served, caplog):
    with caplog.at_level(logging.INFO, "nemotron3.server.access"):
        served.post(CHAT, THREE, headers={"x-request-id": "mine-2"})
        (line,) = _lines(caplog, "mine-2")  # written once the answer has been sent
    assert (line["path"], line["status"], line["completion_tokens"]) == (CHAT, 200, 3)
    assert line["prompt_tokens"] > 3


def _lines(caplog, request_id, timeout_s=10):
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        lines = [json.loads(JsonLines().format(record)) for record in list(caplog.records)]
        if found := [line for line in lines if line.get("request_id") == request_id]:
            return found
        time.sleep(0.01)
    return []


def test_prometheus_reads_counts_and_latencies(served):
    served.post(CHAT, THREE)
    page = served.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    values = dict(
        line.rsplit(" ", 1) for line in page.text.splitlines() if not line.startswith("#")
    )
    assert float(values["nemotron3_generated_tokens_total"]) >= 3
    assert float(values["nemotron3_time_to_first_token_seconds_count"]) >= 1
    assert float(values["nemotron3_time_per_output_token_seconds_count"]) >= 1
    name = f'nemotron3_http_requests_total{{path="{CHAT}",status="200"}}'
    assert float(values[name]) >= 1


def test_the_key_is_asked_of_the_api_and_not_of_the_page(model_folder):
    with running(model_folder, api_key="sesame") as server:
        assert server.get("/").status_code == 200
        assert server.get("/health").status_code == 200
        assert server.get("/metrics").status_code == 401
        with (
            OpenAI(base_url=f"{server.url}/v1", api_key="other") as wrong,
            pytest.raises(AuthenticationError),
        ):
            wrong.models.list()
        with OpenAI(base_url=f"{server.url}/v1", api_key="sesame") as right:
            assert right.models.list().data[0].id == MODEL


def test_the_page_fetches_nothing_from_elsewhere(served):
    page = served.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for sign in ("https://", "src=", "@import", "url("):
        assert sign not in page.text


@pytest.mark.parametrize("path", ["/", "/health"])
def test_a_probe_may_ask_for_the_head_alone(served, path):
    answer = served.send("HEAD", path)
    assert (answer.status_code, answer.content) == (200, b"")


def test_pages_of_kept_prefixes_are_not_in_use(served):
    assert served.post(CHAT, {"messages": HELLO, "max_tokens": 40}).status_code == 200
    assert served.becomes_idle()
    assert served.llm.stats().prefix_bytes > 0
    assert served.llm.stats().kv_usage == 0
