"""Clients that disconnect, slow readers, overload, and the shutdown of a server."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx2
import pytest
import torch

from nemotron3.errors import ConfigError
from nemotron3.inference.structured_output.grammar_compiler import GrammarCompiler
from nemotron3.inference.structured_output.grammar_library import GrammarLibrary
from nemotron3.server.running import bind
from tests.server.serving import running

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
LONG = {"messages": HELLO, "max_tokens": 3000, "ignore_eos": True}


@pytest.fixture(scope="module")
def small(model_folder):
    """A server for one answer at a time, with a queue of one."""
    with running(model_folder, max_num_seqs=1, max_num_waiting=1) as server:
        yield server


def begin(server, body):
    """A connection whose request runs, and which holds little that was not read."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((host, int(port)))
    data = json.dumps(body).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    connection.sendall(head.encode() + data)
    return connection


def waits_until(is_so, timeout_s=20):
    end = time.monotonic() + timeout_s
    while not is_so() and time.monotonic() < end:
        time.sleep(0.01)
    return is_so()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_the_work(small, stream):
    before = small.llm.stats().generated_tokens
    connection = begin(small, LONG | {"stream": stream})
    assert waits_until(lambda: small.llm.stats().num_running == 1)
    connection.close()
    assert small.becomes_idle()
    assert small.llm.stats().generated_tokens - before < 2900
    assert small.post(CHAT, LONG | {"max_tokens": 2}).status_code == 200


def test_more_than_may_wait_are_told_to_come_back(small):
    connections = []
    try:
        connections.append(begin(small, LONG))
        assert waits_until(lambda: small.llm.stats().num_running == 1)
        connections.append(begin(small, LONG))
        assert waits_until(lambda: small.server.in_flight.count == 2)
        time.sleep(0.05)
        answer = small.post(CHAT, LONG | {"stream": True})
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "queue_full"
        assert small.get("/health").status_code == 200
    finally:
        for connection in connections:
            connection.close()
    assert small.becomes_idle()


def test_a_reader_that_is_slow_delays_nobody_and_misses_nothing(served):
    body = LONG | {"stream": True, "max_tokens": 400, "logprobs": True, "top_logprobs": 60}
    with begin(served, body) as connection:
        start = connection.recv(200)
        assert start.startswith(b"HTTP/1.1 200")
        for _ in range(3):
            assert served.post(CHAT, {"messages": HELLO, "max_tokens": 4}).status_code == 200
        assert waits_until(lambda: served.llm.stats().num_running == 0, 60)
        received = start
        while b"[DONE]" not in received:
            part = connection.recv(1 << 16)
            assert part
            received += part
    assert received.count(b'"logprob":') > 400 * 60


def test_a_port_that_is_taken_is_said_before_a_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 cannot be taken"):
            bind("127.0.0.1", port)


def test_a_step_that_fails_ends_what_it_answered_and_nothing_after_it(model_folder, monkeypatch):
    with running(model_folder) as server:
        step = server.llm._engine.step
        steps = []

        def failing_once():
            steps.append(None)
            if len(steps) == 3:
                raise RuntimeError("the machine hiccups")
            return step()

        monkeypatch.setattr(server.llm._engine, "step", failing_once)
        failed = server.post(CHAT, LONG)
        assert failed.status_code == 500
        assert failed.json()["error"]["code"] == "engine_error"
        assert "hiccups" not in failed.text
        assert server.post(CHAT, LONG | {"max_tokens": 9}).status_code == 200


def test_an_answer_that_fails_leaves_the_others(served):
    token = served.llm.tokenizer.encode("Q")[0]
    wrong = LONG | {"structured_outputs": {"regex": "Q"}, "stop_token_ids": [token]}
    wrong |= {"ignore_eos": False, "chat_template_kwargs": {"enable_thinking": False}}
    with begin(served, LONG | {"stream": True, "max_tokens": 300}) as connection:
        assert connection.recv(20).startswith(b"HTTP/1.1 200")
        assert served.post(CHAT, wrong).status_code == 400
        received = b""
        while b"[DONE]" not in received:
            received += connection.recv(1 << 16)
    assert b'"finish_reason":"length"' in received
    assert b"error" not in received


def test_a_model_that_fails_in_a_form_is_the_servers_fault(model_folder, monkeypatch):
    with running(model_folder) as server:
        logits = server.llm._engine.model.logits
        monkeypatch.setattr(
            server.llm._engine.model, "logits", lambda hidden: logits(hidden) * torch.nan
        )
        form = {"structured_outputs": {"regex": "Q"}}
        failed = server.post(CHAT, {"messages": HELLO} | form)
    assert failed.status_code == 500
    assert failed.json()["error"]["code"] == "engine_error"
    assert "logits are NaN" in failed.json()["error"]["message"]


@pytest.mark.parametrize("is_first", [True, False])
def test_a_form_that_takes_long_to_compile_delays_nobody(model_folder, monkeypatch, is_first):
    is_compiling, may_go_on = threading.Event(), threading.Event()
    holder, held = (GrammarCompiler, "__init__") if is_first else (GrammarLibrary, "compile")
    works = getattr(holder, held)

    def slowly(*given, **named):
        if is_first or given[-1] == "slow":
            is_compiling.set()
            assert may_go_on.wait(60)
        return works(*given, **named)

    with running(model_folder) as server:
        if not is_first:
            server.llm.prepare_grammars()
        monkeypatch.setattr(holder, held, slowly)
        body = {"messages": HELLO, "chat_template_kwargs": {"enable_thinking": False}}
        answers = []
        form = {"structured_outputs": {"regex": "slow"}}
        asking = threading.Thread(target=lambda: answers.append(server.post(CHAT, body | form)))
        asking.start()
        try:
            assert is_compiling.wait(60)
            free = [server.post(CHAT, body | {"max_tokens": 3})]
            if not is_first:
                free.append(server.post(CHAT, body | {"structured_outputs": {"regex": "quick"}}))
            assert not answers
        finally:
            may_go_on.set()
            asking.join(60)
    assert [answer.status_code for answer in free + answers] == [200] * (len(free) + 1)
    assert answers[0].json()["choices"][0]["message"]["content"] == "slow"


@contextmanager
def serving_process(model_folder, *options):
    """`nemotron3 serve` as a process; with its address, the lines of its log, and what it logged
    until requests were taken."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "nemotron3.cli.main", "serve", str(model_folder)]
    command += ["--port", str(port), "--log-format", "json", "--device", "cpu", *options]
    environment = os.environ | {"NEMOTRON3_API_KEY": "sesame"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=lambda: [lines.put(x) for x in process.stderr]).start()
        try:
            logged = [json.loads(lines.get(timeout=60))]
            while "requests are accepted" not in logged[-1]["message"]:
                logged.append(json.loads(lines.get(timeout=60)))
            yield process, f"http://127.0.0.1:{port}", lines, logged
        finally:
            process.kill()


@pytest.mark.slow
def test_what_is_not_finished_in_time_is_told_so(model_folder):
    """An unfinished answer gets a 503, a stream an error event, so that neither looks complete."""
    headers = {"authorization": "Bearer sesame"}
    stream = LONG | {"stream": True, "n": 8}
    asked = {
        "whole": (CHAT, LONG | {"n": 8}),
        "chat": (CHAT, stream),
        "completions": ("/v1/completions", {**stream, "prompt": "Hello", "max_tokens": 3900}),
        "responses": ("/v1/responses", {"input": "Hello", "ignore_eos": True, "stream": True}),
    }
    asked["completions"][1].pop("messages")
    answers = {}

    def ask(name):
        path, body = asked[name]
        answers[name] = httpx2.post(f"{url}{path}", json=body, headers=headers, timeout=60)

    with serving_process(model_folder, "--drain-timeout", "0.1") as (process, url, lines, _):
        threads = [threading.Thread(target=ask, args=(name,)) for name in asked]
        for thread in threads:
            thread.start()
        metrics = "nemotron3_requests_running"

        def all_run():
            text = httpx2.get(f"{url}/metrics", headers=headers).text
            lines = [line for line in text.splitlines() if line.startswith(metrics)]
            return bool(lines) and float(lines[0].split()[-1]) == 25

        assert waits_until(all_run)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(30)
        assert process.wait(30) == 0
        logged = "".join(lines.get() for _ in range(lines.qsize()))
    whole = answers["whole"]
    assert (whole.status_code, whole.json()["error"]["code"]) == (503, "aborted")
    assert int(whole.headers["retry-after"]) >= 1
    for name in ("chat", "completions"):
        said, done = answers[name].text.split("\n\n")[-3:-1]
        assert json.loads(said.removeprefix("data: "))["error"]["code"] == "aborted"
        assert done == "data: [DONE]"
    assert "event: response.failed" in answers["responses"].text.split("\n\n")[-2]
    assert "4 requests were not finished" in logged
    assert "Traceback" not in logged


@pytest.mark.slow
def test_the_first_signal_finishes_what_runs_and_sends_the_rest_elsewhere(model_folder):
    with serving_process(model_folder) as (process, url, lines, logged):
        _scenario(process, url, lines, logged)


def _scenario(process, url, lines, logged):
    headers = {"authorization": "Bearer sesame"}
    received = []
    with httpx2.stream(
        "POST",
        f"{url}{CHAT}",
        json=LONG | {"stream": True, "max_tokens": 600},
        headers=headers,
        timeout=60,
    ) as stream:
        events = stream.iter_lines()
        received += [next(events) for _ in range(8)]
        process.send_signal(signal.SIGTERM)
        assert waits_until(lambda: httpx2.get(f"{url}/health").status_code == 503)
        late = httpx2.post(f"{url}{CHAT}", json=LONG, headers=headers)
        assert late.status_code == 503
        assert int(late.headers["retry-after"]) >= 1
        assert late.json()["error"]["code"] == "draining"
        received += list(events)
    assert received[-2 if not received[-1] else -1] == "data: [DONE]"
    assert process.wait(30) == 0
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{url}/health")
    while not lines.empty():
        logged.append(json.loads(lines.get()))
    requests = [line for line in logged if line["message"] == "request" and line["path"] == CHAT]
    assert sorted(line["status"] for line in requests) == [200, 503]
    assert not [line for line in logged if line["level"] == "error"]
    assert "sesame" not in json.dumps(logged)
