"""The page to chat, in a real browser.

Runs where a Chromium is installed (`apt-get install chromium`, or NEMOTRON3_CHROMIUM); set
NEMOTRON3_SCREENSHOTS to a folder to look at what it looks like.
"""

import asyncio
import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nemotron3.cli import chat
from nemotron3.environments.calculator import CALCULATE
from nemotron3.environments.environment import ERROR
from nemotron3.text import ParsedCall
from tests.server.serving import running

CHROMIUM = os.environ.get("NEMOTRON3_CHROMIUM") or shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - starts a process of its own

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    pages = []

    def open_page(url, **options):
        page = browser.new_page(viewport={"width": 1000, "height": 760}, **options)
        page.set_default_timeout(20_000)
        page.wrong = []
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        page.on("console", lambda said: said.type == "error" and page.wrong.append(said.text))
        page.asked = []
        page.on("request", lambda request: page.asked.append(request))
        page.route("**/completions", endless)
        page.goto(url)
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()


def limit(page, tokens):
    page.click("#settings")
    page.fill("#most", str(tokens))
    page.click("dialog button")


def set_range(page, name, value):
    page.eval_on_selector(
        f"#{name}", "(e, v) => { e.value = v; e.dispatchEvent(new Event('input')); }", value
    )


def say(page, text):
    page.fill("#say", text)
    page.keyboard.press("Enter")


def answered(page):
    page.locator("#send", has_text="Send").wait_for()


def bodies(page):
    return [
        request.post_data_json for request in page.asked if request.url.endswith("/completions")
    ]


def endless(route):
    """Let an answer go on beyond the end that a random model comes upon."""
    body = route.request.post_data_json | {"ignore_eos": True}
    route.continue_(post_data=json.dumps(body))


def look(page, name):
    if folder := os.environ.get("NEMOTRON3_SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


@pytest.fixture(scope="module")
def always_drafting(model_folder):
    """A server whose answers have drafts on any machine; elsewhere timing decides."""
    with running(model_folder, adapts_drafts=False) as server:
        yield server


@pytest.fixture
def held(always_drafting, monkeypatch):
    """Lets an answer begin and go on only when it is told to.

    On a busy machine a browser may otherwise get an answer in one piece, which has no speed.
    """
    engine = always_drafting.llm._engine
    step, goes_on = engine.step, threading.Event()
    begun = engine.stats().generated_tokens + 2

    def held_step():
        if engine.stats().generated_tokens >= begun:
            assert goes_on.wait(60), "the page never showed the first tokens"
        return step()

    monkeypatch.setattr(engine, "step", held_step)
    yield goes_on
    goes_on.set()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_answer_appears_with_its_thinking_folded_and_its_figures(
    always_drafting, held, open_page, scheme
):
    served = always_drafting
    page = open_page(served.url, color_scheme=scheme)
    page.locator("#model", has_text="4,096").wait_for()
    look(page, f"empty-{scheme}")
    limit(page, 60)
    set_range(page, "budget", 1)
    assert page.text_content("#budget-shown") == "16"
    say(page, "Hello there")
    page.locator(".facts .ttft").wait_for()
    page.wait_for_timeout(50)  # a speed is shown of what takes 20 ms
    held.set()
    answered(page)
    thinking = page.locator("details.thinking")
    assert thinking.get_attribute("open") is None
    assert "Thought for 1" in thinking.locator("summary").text_content()
    assert not thinking.locator("div").is_visible()
    thinking.locator("summary").click()
    assert thinking.locator("div").is_visible()
    assert page.text_content(".answer").strip()
    assert page.text_content(".user") == "Hello there"
    for name, sign in (
        ("ttft", "first token"),
        ("speed", "tokens/s"),
        ("tokens", "of them thinking"),
        ("drafts", "drafts accepted"),
    ):
        assert sign in page.text_content(f".facts .{name}")
    (body,) = bodies(page)
    assert body["reasoning_budget"] == 16
    assert body["chat_template_kwargs"] == {"enable_thinking": True}
    look(page, f"answer-{scheme}")
    assert page.wrong == []
    assert all(request.url.startswith((served.url, "data:")) for request in page.asked)


def test_thinking_can_be_switched_off_and_its_budget_lifted_or_closed(served, open_page):
    page = open_page(served.url)
    limit(page, 12)
    assert page.text_content("#budget-shown") == "max"
    say(page, "one")
    answered(page)
    set_range(page, "budget", 0)
    assert page.text_content("#budget-shown") == "off"
    say(page, "two")
    answered(page)
    page.uncheck("#think")
    assert page.is_disabled("#budget")
    set_range(page, "temperature", 0)
    say(page, "three")
    answered(page)
    first, second, third = bodies(page)
    assert "reasoning_budget" not in first
    assert second["reasoning_budget"] == 0
    assert third["chat_template_kwargs"] == {"enable_thinking": False}
    assert "reasoning_budget" not in third
    assert third["temperature"] == 0
    assert [m["role"] for m in third["messages"]] == ["user", "assistant"] * 2 + ["user"]
    assert "reasoning_content" in third["messages"][1]
    assert page.locator("details.thinking:visible").count() == 1
    page.click("#fresh")
    assert page.locator(".user").count() == 0
    say(page, "four")
    answered(page)
    assert len(bodies(page)[-1]["messages"]) == 1
    assert page.wrong == []


def streamed(*deltas, finish):
    """An answer as the server streams it."""
    chunks = [
        {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas
    ]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def part_of_call(index, arguments, **named):
    return {"index": index, "function": {"arguments": arguments} | named, "id": f"call_{index}"}


def test_the_calculator_is_that_of_the_environment(served, open_page):
    page = open_page(served.url)
    offered = page.evaluate("CALCULATE.function")
    assert offered == {
        "name": CALCULATE.name,
        "description": CALCULATE.description,
        "parameters": CALCULATE.parameters,
    }
    calls = [
        ParsedCall(name=name, arguments=json.dumps({"expression": expression}))
        for name, expression in [
            ("calculate", "65*47"),
            ("calculate", " 3055 - 4000 "),
            ("calculate", "-7+999999999999999"),
            ("calculate", "999999999999999*999999999999999"),
            ("calculate", "1/2"),
            ("calculate", "1+2+3"),
            ("calculate", "1234567890123456+1"),
            ("calculate", ""),
        ]
    ]
    with ThreadPoolExecutor(1) as elsewhere:  # a loop of Playwright's is in this thread
        results = [elsewhere.submit(asyncio.run, chat._call(call)).result() for call in calls]
    for call, wanted in zip(calls, results, strict=True):
        given = {"name": call.name, "arguments": call.arguments}
        assert page.evaluate("(call) => calculate(call)", given) == wanted
    for wrong in ("", "{", "[]", "null", "{}"):
        given = {"name": "calculate", "arguments": wrong}
        assert page.evaluate("(call) => calculate(call)", given).startswith(ERROR)


def test_calls_are_run_and_the_answer_goes_on(served, open_page):
    page = open_page(served.url)
    answers = [
        streamed(
            {"reasoning": "(step 1)"},
            {"tool_calls": [part_of_call(0, "", name="calculate")]},
            {"tool_calls": [part_of_call(0, '{"expression": "65')]},
            {"tool_calls": [part_of_call(0, '*47"}')]},
            {"tool_calls": [part_of_call(1, '{"expression": "1+1"}', name="calculate")]},
            finish="tool_calls",
        ),
        streamed({"content": "3055"}, finish="stop"),
        streamed({"content": "no tools"}, finish="stop"),
    ]
    page.unroute("**/completions")
    page.route(
        "**/completions",
        lambda route: route.fulfill(
            body=answers.pop(0), headers={"Content-Type": "text/event-stream"}
        ),
    )
    say(page, "Calculate 65 times 47.")
    answered(page)
    assert page.locator(".call").all_text_contents() == [
        'calculate {"expression": "65*47"} = 3055',
        'calculate {"expression": "1+1"} = 2',
    ]
    assert page.locator(".answer").last.text_content() == "3055"
    look(page, "calculator")
    page.uncheck("#tools")
    say(page, "And?")
    answered(page)
    first, second, third = bodies(page)
    assert first["tools"][0]["function"]["name"] == "calculate"
    asked, called, *results = second["messages"]
    assert asked["content"] == "Calculate 65 times 47."
    assert called["reasoning_content"] == "(step 1)"
    assert [call["function"]["arguments"] for call in called["tool_calls"]] == [
        '{"expression": "65*47"}',
        '{"expression": "1+1"}',
    ]
    assert [(m["tool_call_id"], m["content"]) for m in results] == [
        ("call_0", "3055"),
        ("call_1", "2"),
    ]
    assert "tools" not in third
    assert third["messages"][-1] == {"role": "user", "content": "And?"}
    assert page.wrong == []


def test_a_model_that_calls_for_ever_is_ended(served, open_page):
    page = open_page(served.url)
    page.unroute("**/completions")
    call = part_of_call(0, '{"expression": "1+1"}', name="calculate")
    body = streamed({"content": "x"}, {"tool_calls": [call]}, finish="tool_calls")
    page.route(
        "**/completions",
        lambda route: route.fulfill(body=body, headers={"Content-Type": "text/event-stream"}),
    )
    say(page, "Calculate.")
    answered(page)
    assert len(bodies(page)) == page.evaluate("MOST_CALLS")
    assert page.wrong == []


def test_stop_stops_the_engine_too(served, open_page, monkeypatch):
    step = served.llm._engine.step
    # A tiny model would be done before anyone has found the button.
    monkeypatch.setattr(served.llm._engine, "step", lambda: time.sleep(0.02) or step())
    page = open_page(served.url)
    say(page, "Hello")
    page.wait_for_selector("details.thinking:visible")
    assert page.text_content("#send") == "Stop"
    page.click("#send")
    answered(page)
    assert "stopped" in page.text_content(".facts")
    assert served.becomes_idle()
    assert page.wrong == []


def test_text_is_text_and_code_is_code(served, open_page):
    page = open_page(served.url)
    shown = page.evaluate(
        """() => {
            const box = document.createElement("div");
            write(box, "a <b>x</b> `c` **d**\\n\\nnext\\n```py\\n<i>1</i>\\n```\\nend");
            return box.innerHTML;
        }"""
    )
    assert shown == (
        "<p>a &lt;b&gt;x&lt;/b&gt; <code>c</code> <strong>d</strong></p><p>next</p>"
        "<pre><code>&lt;i&gt;1&lt;/i&gt;</code></pre><p>end</p>"
    )


def test_a_refusal_is_shown_and_a_key_opens(model_folder, open_page):
    with running(model_folder, api_key="sesame") as server:
        page = open_page(server.url)
        page.locator("#model", has_text="key").wait_for()
        say(page, "Hello")
        answered(page)
        assert "the API key is missing or wrong" in page.text_content(".wrong")
        page.click("#settings")
        page.fill("#key", "sesame")
        page.fill("#most", "5")
        page.click("dialog button")
        page.locator("#model", has_text="tiny").wait_for()
        say(page, "Hello")
        answered(page)
        assert "5 tokens" in page.text_content(".facts")
