"""A grammar that would crash a process gives a 400 at every endpoint, and the server continues."""

import asyncio
import json
import threading

import httpx2
import pytest

from tests.inference.structured_output.killers import chain, chained_tool, rules
from tests.server.serving import MODEL, running, write_model

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
RESPONSE = {"model": MODEL, "input": "x", "max_output_tokens": 4}
TEXT = {"model": MODEL, "prompt": "x", "max_tokens": 4}
SCHEMA = {"name": "n", "schema": chain(1000)}
TOOL = chained_tool(1000)
WAYS = [
    ("chat/completions", CHAT | {"response_format": {"type": "json_schema", "json_schema": SCHEMA}},
     "response_format"),
    ("chat/completions", CHAT | {"structured_outputs": {"json": chain(1000)}},
     "structured_outputs.json"),
    ("chat/completions", CHAT | {"structured_outputs": {"grammar": rules(5000)}},
     "structured_outputs.grammar"),
    ("chat/completions", CHAT | {"tools": [TOOL], "tool_choice": "required"}, "tools"),
    ("chat/completions", CHAT | {"tools": [TOOL], "tool_choice": "required", "stream": True},
     "tools"),
    ("responses", RESPONSE | {"text": {"format": {"type": "json_schema"} | SCHEMA}},
     "text.format"),
    ("responses", RESPONSE | {"structured_outputs": {"grammar": rules(5000)}},
     "structured_outputs.grammar"),
    ("responses", RESPONSE | {"tools": [{"type": "function", **TOOL["function"]}],
                              "tool_choice": "required"}, "tools"),
    ("completions", TEXT | {"structured_outputs": {"json": chain(1000)}},
     "structured_outputs.json"),
    ("completions", TEXT | {"structured_outputs": {"grammar": rules(5000)}, "stream": True},
     "structured_outputs.grammar"),
]  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server that can read a list of such tools."""
    folder = write_model(tmp_path_factory.mktemp("long"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 262_144}))
    with running(folder) as server:
        yield server


@pytest.mark.parametrize(("path", "body", "param"), WAYS)
def test_a_grammar_that_ends_a_process_is_refused(served, path, body, param):
    for _ in range(2):
        refused = served.post(f"/v1/{path}", body)
        error = refused.json()["error"]
        assert refused.status_code == 400
        assert error["param"] == param
        assert "too deep or too large to be compiled" in error["message"]
    answer = served.post("/v1/completions", TEXT | {"structured_outputs": {"choice": ["yes"]}})
    assert answer.json()["choices"][0]["text"] in ("y", "ye", "yes")


@pytest.fixture
def blocked(served):
    """A server whose grammars wait."""
    served.post("/v1/completions", TEXT | {"structured_outputs": {"choice": ["yes"]}})
    checks = served.llm._frontend.compiler()._checks
    in_flight = threading.Event()
    checks.submit(in_flight.wait)
    yield checks
    in_flight.set()


def waits(checks, count):
    async def until():
        while checks._num_waiting != count:
            await asyncio.sleep(0.01)

    return asyncio.wait_for(until(), 20)


def test_while_grammars_wait_others_are_answered_and_who_leaves_waits_no_more(served, blocked):
    async def run():
        async with httpx2.AsyncClient(base_url=served.url, timeout=60) as client:
            waiting = [
                asyncio.ensure_future(
                    client.post("/v1/completions", json=TEXT | {"structured_outputs": form})
                )
                for form in ({"regex": f"waiting{i}"} for i in range(12))
            ]
            await waits(blocked, 13)
            free = await client.post("/v1/completions", json=TEXT)
            known = {"structured_outputs": {"choice": ["yes"]}}
            held = await client.post("/v1/completions", json=TEXT | known)
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            await waits(blocked, 1)
            return free.status_code, held.status_code

    assert asyncio.run(run()) == (200, 200)


def test_too_many_waiting_grammars_are_a_429(served, blocked, monkeypatch):
    monkeypatch.setattr("nemotron3.inference.structured_output.grammar_checks._MAX_WAITING", 1)
    refused = served.post("/v1/completions", TEXT | {"structured_outputs": {"regex": "one more"}})
    assert refused.status_code == 429
    assert refused.headers["retry-after"]
