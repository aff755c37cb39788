"""Talking in the terminal: commands, thinking, figures, interruptions."""

import io
import json
import os
import re
import signal

import pytest

from nemotron3.cli import chat
from nemotron3.cli.chat import Talk
from nemotron3.cli.main import main
from nemotron3.text import ParsedCall
from tests.server.serving import write_model

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def talk(monkeypatch, capsys, model_folder):
    def talk(*lines, options=()):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert main(["chat", str(model_folder), "--device", "cpu", *options]) == 0
        return capsys.readouterr()

    return talk


COMMANDS = {
    "/budget 12": ({"budget": 12}, "thinking for at most 12 tokens"),
    "/budget off": ({"budget": 0}, "thinking for at most 0 tokens"),
    "/budget max": ({"budget": None}, "thinking without a limit"),
    "/think off": ({"is_thinking": False}, "no thinking"),
    "/think on": ({"is_thinking": True}, "thinking without a limit"),
    "/tools off": ({"has_tools": False}, "no tools"),
    "/tools on": ({"has_tools": True}, "the calculator is offered"),
    "/clear": ({"messages": []}, "the conversation is forgotten"),
}


@pytest.mark.parametrize(("line", "expected"), COMMANDS.items())
def test_a_command_changes_what_it_says(line, expected):
    talk = Talk(messages=[{"role": "user", "content": "x"}])
    changed, said = expected
    assert talk.command(line) == said
    assert {name: getattr(talk, name) for name in changed} == changed


@pytest.mark.parametrize("line", ["/budget", "/budget -3", "/budget x", "/think maybe", "/what"])
def test_what_is_no_command_is_answered_with_the_commands(line):
    before = Talk()
    assert before.command(line).startswith(f"{line} is not understood")
    assert before == Talk()
    assert "/budget N" in before.command(line)


def test_calls_are_run_and_the_answer_goes_on(talk, monkeypatch):
    seen = []
    answers = [
        [("calculate", {"expression": "65*47"}), ("calculate", {"expression": "1+1+1"})],
        [("search", {"query": "x"})],
        [],
        [],
    ]

    async def answer(llm, talk, printer):
        seen.append((llm.prepare_chat(talk.conversation()), [*talk.messages], talk.has_tools))
        printer.say("so")
        return [ParsedCall(name, json.dumps(given), True) for name, given in answers.pop(0)]

    monkeypatch.setattr(chat, "_answer", answer)
    said = talk("Calculate.", "/tools off", "And?").out
    assert 'calculate {"expression": "65*47"} = 3055\n' in said
    assert "= error: the expression is not two whole numbers" in said
    last = seen[-1][1]
    assert [m["role"] for m in last] == [
        "user",
        *["assistant", "tool", "tool"],
        *["assistant", "tool"],
        *["assistant", "user"],
    ]
    assert [m["tool_call_id"] for m in last if m["role"] == "tool"] == [
        "call_0",
        "call_1",
        "call_0",
    ]
    assert [has_tools for *_, has_tools in seen] == [True, True, True, False]


def test_a_model_that_calls_for_ever_is_ended(talk, monkeypatch):
    async def answer(llm, talk, printer):
        return [ParsedCall("calculate", '{"expression": "1+1"}', True)]

    monkeypatch.setattr(chat, "_answer", answer)
    assert talk("Calculate.").out.count("= 2") == chat._MOST_CALLS


def test_a_budget_that_cannot_be_is_refused_by_its_option(model_folder, capsys):
    assert main(["chat", str(model_folder), "--device", "cpu", "--budget", "-1"]) == 2
    assert "--budget is -1; it must be 0 or more" in capsys.readouterr().err


def test_an_answer_comes_with_its_figures(talk):
    said = talk("Hello", options=["--budget", "5", "--max-tokens", "30"]).out
    assert "tokens, 6 of them thinking" in said or "tokens, 5 of them thinking" in said
    assert "tokens/s, first after" in said
    assert "% of drafts accepted" in said
    assert "\x1b[2m" not in said  # no colours where no terminal is


def test_no_control_character_of_an_answer_reaches_a_terminal(talk, monkeypatch):
    options = ["--max-tokens", "300", "--temperature", "100", "--top-p", "1", "--budget", "150"]
    assert CONTROL.search(talk("Hello", options=options).out), "nothing was tested"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    said = talk("Hello", options=options).out
    assert "\x1b[2m" in said
    assert not CONTROL.search(said.replace("\x1b[2m", "").replace("\x1b[0m", ""))
    assert "␛" in said or "␀" in said or "�" in said


def test_the_model_says_how_it_is_sampled_unless_the_user_does(talk, model_folder):
    file = model_folder / "generation_config.json"
    before = file.read_text()
    file.write_text(json.dumps({"temperature": 0.0, "top_k": 1, "max_new_tokens": 3}))
    try:
        assert "[3 tokens" in talk("Hello").out
        assert "[2 tokens" in talk("Hello", options=["--max-tokens", "2"]).out
        options = ["--generation-config", "none", "--max-tokens", "7"]
        assert "[7 tokens" in talk("Hello", options=options).out
        file.write_text(json.dumps({"top_p": 7}))
        assert main(["chat", str(model_folder), "--device", "cpu"]) == 2
    finally:
        file.write_text(before)


def test_lines_are_answered_one_after_the_other_and_commands_obeyed(talk):
    options = ["--max-tokens", "8"]
    said = talk("one", "/think off", "two", "", "/exit", "three", options=options).out
    assert said.count("first after") == 2
    first, second = said.split("no thinking")
    assert "of them thinking" in first
    assert "of them thinking" not in second


def test_a_limit_that_cannot_be_is_said_and_the_talk_goes_on(talk):
    said = talk("one", "two", options=["--max-tokens", "5000"])
    assert said.err.count("nemotron3: ") == 2
    assert "5000" in said.err


@pytest.fixture
def _interruptible():
    """A shell starts what it puts in the background with interruptions ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_an_interruption_stops_the_answer_and_not_the_talk(talk, monkeypatch):
    shown = chat._Printer.think

    def interrupted(printer, text):
        shown(printer, text)
        if len(printer.reasoning) == len(text):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(chat._Printer, "think", interrupted)
    said = talk("one", "/clear", options=["--max-tokens", "3000"]).out
    assert "[stopped]" in said
    assert "the conversation is forgotten" in said
