"""A separate process compiles grammars first, so no grammar can end the engine's process."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from nemotron3.errors import BackendUnavailableError, ConfigError, OverloadedError
from nemotron3.inference.requests import StructuredOutput
from nemotron3.inference.structured_output import grammar_checks, grammar_compiler
from nemotron3.inference.structured_output.grammar_checks import GrammarChecks
from nemotron3.inference.structured_output.grammar_compiler import GrammarCompiler
from nemotron3.text import Tokenizer
from tests.inference.structured_output.killers import KILLERS
from tests.server.serving import write_model


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["a few words"] * 5, vocab_size=300, num_special_tokens=32)


@pytest.fixture
def compiler(tokenizer):
    compiler = GrammarCompiler(tokenizer, vocab_size=tokenizer.vocab_size)
    yield compiler
    compiler.close()


def ask(compiler, structured):
    return compiler.constraint(structured, stop_ids=frozenset({2}), is_reasoning_open=False)


def regex(value):
    return StructuredOutput(kind="regex", value=value)


def worker_of(compiler):
    process = compiler._checks._worker._process
    return None if process is None else process.pid


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


def ends(pid, timeout_s=30):
    end = time.monotonic() + timeout_s
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not is_running(pid)


@pytest.mark.parametrize("killer", KILLERS)
def test_a_grammar_that_ends_a_process_is_refused_and_others_go_on(compiler, killer, monkeypatch):
    assert ask(compiler, regex("a+")).mask().any()
    first = worker_of(compiler)
    with pytest.raises(ConfigError, match="it is too deep or too large to be compiled; change it"):
        ask(compiler, KILLERS[killer])
    assert not is_running(first)
    started = []
    monkeypatch.setattr(compiler._checks._worker, "start", started.append)
    with pytest.raises(ConfigError, match="it is too deep or too large"):
        ask(compiler, KILLERS[killer])
    assert started == [], "the verdict is remembered"
    monkeypatch.undo()
    assert ask(compiler, regex("b+")).mask().any()


def test_a_worker_that_somebody_ends_is_started_again(compiler):
    ask(compiler, regex("a"))
    first = worker_of(compiler)
    os.kill(first, signal.SIGKILL)
    assert ask(compiler, regex("b")).mask().any()
    assert worker_of(compiler) not in (None, first)


def test_an_error_of_a_grammar_is_told_as_it_is(compiler):
    with pytest.raises(ConfigError, match="unclosed group"):
        ask(compiler, regex("(a"))
    first = worker_of(compiler)
    with pytest.raises(ConfigError, match="unclosed group"):
        ask(compiler, regex("(a"))
    assert worker_of(compiler) == first is not None


def test_a_grammar_that_takes_too_long_is_refused(compiler, monkeypatch):
    ask(compiler, regex("a"))
    monkeypatch.setattr(grammar_checks, "MAX_COMPILE_S", 0.05)
    properties = {f"p{i}": {"type": "string", "maxLength": i + 3} for i in range(3000)}
    slow = StructuredOutput(kind="json_schema", value={"properties": properties})
    with pytest.raises(ConfigError, match=r"takes more than 0\.05 seconds"):
        ask(compiler, slow)
    assert worker_of(compiler) is None
    monkeypatch.undo()
    assert ask(compiler, regex("b")).mask().any()


def test_verdicts_are_bounded(compiler, monkeypatch):
    monkeypatch.setattr(grammar_checks, "_MAX_VERDICTS", 3)
    monkeypatch.setattr(grammar_compiler, "_MAX_CACHED", 1)
    for i in range(8):
        ask(compiler, regex(f"a{{{i + 1}}}"))
    assert len(compiler._checks._verdicts) == 3


@pytest.fixture
def blocked():
    """Checks whose thread is busy until the event is set."""
    checks = GrammarChecks({})
    gate, entered = threading.Event(), threading.Event()

    def wait():
        entered.set()
        gate.wait()

    checks.submit(wait)
    entered.wait()
    yield checks, gate
    gate.set()
    checks.close()


def test_grammars_come_to_their_turn_in_the_order_in_which_they_came(blocked):
    checks, gate = blocked
    done = []
    futures = [checks.submit(lambda i=i: done.append(i)) for i in range(10)]
    assert futures[3].cancel()
    gate.set()
    for i, future in enumerate(futures):
        if i != 3:
            future.result()
    assert done == [i for i in range(10) if i != 3]


def test_too_many_waiting_grammars_are_refused_until_some_are_done_or_given_up(blocked):
    checks, gate = blocked
    futures = [checks.submit(lambda: None) for _ in range(grammar_checks._MAX_WAITING - 1)]
    with pytest.raises(OverloadedError, match="grammars are waiting to be compiled; try later"):
        checks.submit(lambda: None)
    assert futures[0].cancel()
    checks.submit(lambda: None)
    gate.set()
    for future in futures[1:]:
        future.result()


def test_closing_gives_up_what_waits(blocked):
    checks, _ = blocked
    future = checks.submit(lambda: None)
    checks.close()
    assert future.cancelled()
    with pytest.raises(OverloadedError, match="has been closed"):
        checks.submit(lambda: None)


def test_closing_ends_the_worker_and_so_does_forgetting_the_compiler(tokenizer):
    pids = []
    for is_closed in (True, False):
        compiler = GrammarCompiler(tokenizer, vocab_size=tokenizer.vocab_size)
        ask(compiler, regex("a"))
        pids.append(worker_of(compiler))
        if is_closed:
            compiler.close()
        del compiler
    assert len(set(pids)) == 2, "each compiler has its own"
    assert all(map(ends, pids))


def test_a_worker_that_does_not_start_is_said(compiler, monkeypatch):
    monkeypatch.setattr(grammar_checks, "_WORKER", "nemotron3.inference.nothing")
    with pytest.raises(BackendUnavailableError, match=r"-m nemotron3\.inference\.nothing` to see"):
        ask(compiler, regex("a"))


PARENT = """
import sys
from nemotron3.inference.requests import StructuredOutput
from nemotron3.inference.structured_output.grammar_compiler import GrammarCompiler
from nemotron3.text import Tokenizer
tokenizer = Tokenizer.train(["a few words"] * 5, vocab_size=300, num_special_tokens=32)
compiler = GrammarCompiler(tokenizer, vocab_size=tokenizer.vocab_size)
compiler.check(StructuredOutput(kind="regex", value="a")).result()
print(compiler._checks._worker._process.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, None])
def test_a_worker_does_not_outlive_its_parent(how):
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        if how is not None:
            parent.send_signal(how)
        parent.stdin.close()
    assert parent.returncode == (0 if how is None else -how)
    assert ends(pid)


SCRIPT = """
import sys
from nemotron3 import LLM, SamplingParams
from nemotron3.errors import ConfigError
from nemotron3.inference.requests import StructuredOutput
from tests.inference.structured_output.killers import KILLERS

print("begins")
llm = LLM(sys.argv[1], device="cpu")
for structured in KILLERS.values():
    try:
        llm.generate("Hello", SamplingParams(max_tokens=4, structured=structured))
    except ConfigError as error:
        print("refused", error)
choice = StructuredOutput(kind="choice", value=["yes"])
(answer,) = llm.generate("Hello", SamplingParams(max_tokens=9, structured=choice))
print("said", answer.outputs[0].text)
"""


@pytest.mark.slow
def test_a_plain_script_is_run_once_and_goes_on(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, str(script), str(write_model(tmp_path / "model"))],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    lines = run.stdout.splitlines()
    assert run.returncode == 0, run.stderr
    assert [line.split()[0] for line in lines] == ["begins", "refused", "refused", "said"]
    assert lines[-1] == "said yes"
    assert "egmentation" not in run.stderr
    assert "panicked" not in run.stderr
