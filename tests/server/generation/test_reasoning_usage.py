"""A budget of reasoning, and the tokens that usage counts, at every endpoint, whole or streamed."""

import json

import pytest

from nemotron3.errors import ConfigError
from nemotron3.server.app import ServerSettings
from tests.server.serving import MODEL, running

QUESTION = [{"role": "user", "content": "Hello there, why?"}]
ENDPOINTS = ("chat", "responses", "completions")


@pytest.fixture(scope="module")
def crowded(model_folder):
    """A server with few pages and a grace, so that requests are preempted and budgets wait."""
    with running(
        model_folder, reasoning_grace=500, kv_cache_bytes=2**17, max_num_seqs=6, page_size=8,
        prefix_cache_bytes=0,
    ) as server:  # fmt: skip
        yield server


def free(server):
    """Biases that prevent a model from ending its reasoning, its answer or a line."""
    text = server.llm.tokenizer
    lines = [i for i in range(text.vocab_size) if i not in text.special_ids
             and text.token_bytes(i).endswith(b"\n")]  # fmt: skip
    return {str(i): -100 for i in (*text.special_ids, *lines)}


def ask(server, endpoint, *, stream=False, **body):
    """Reasoning tokens and all tokens, as the endpoint reports them."""
    body = {"model": MODEL, "seed": 1, "stream": stream, **body}
    most = body.pop("max_tokens", 40)
    if endpoint == "responses":
        path, more = "/v1/responses", {"input": QUESTION, "max_output_tokens": most}
    elif endpoint == "chat":
        path, more = "/v1/chat/completions", {"messages": QUESTION, "max_tokens": most}
    else:
        ids = server.post("/tokenize", {"messages": QUESTION}).json()["tokens"]
        path, more = "/v1/completions", {"prompt": ids, "max_tokens": most}
    if stream and endpoint != "responses":
        more["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    answer = server.post(path, body | more)
    assert answer.status_code == 200, answer.text
    if stream:
        lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
        events = [json.loads(line) for line in lines if line != "[DONE]"]
        if endpoint == "responses":
            return counts(events[-1]["response"]["usage"])
        so_far = [counts(event["usage"]) for event in events if event["usage"]]
        assert so_far == sorted(so_far)
        return so_far[-1]
    return counts(answer.json()["usage"])


def counts(usage):
    if "output_tokens" in usage:
        return usage["output_tokens_details"]["reasoning_tokens"], usage["output_tokens"]
    return usage["completion_tokens_details"]["reasoning_tokens"], usage["completion_tokens"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_usage_counts_the_tokens_between_the_tags(served, endpoint, stream):
    def reasoning(**body):
        return ask(served, endpoint, stream=stream, logit_bias=free(served), **body)

    for name in ("reasoning_budget", "thinking_token_budget"):
        assert reasoning(**{name: 16}) == (16, 40)
    assert reasoning(reasoning_budget=0) == (0, 40)
    # Unfinished: in the reasoning, and with the first token of its forced end.
    assert reasoning(max_tokens=9) == (9, 9)
    assert reasoning(reasoning_budget=16, max_tokens=17) == (16, 17)
    assert reasoning(reasoning_budget=16, max_tokens=16) == (16, 16)
    assert reasoning(reasoning_budget=5, reasoning_grace=7) == (12, 40)
    if endpoint != "completions":
        off = {"enable_thinking": False}
        assert reasoning(chat_template_kwargs=off) == (0, 40)
        assert reasoning(chat_template_kwargs=off, reasoning_budget=3) == (0, 40)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_the_servers_grace_is_the_default_and_the_request_decides(crowded, endpoint):
    biases = free(crowded)
    assert ask(crowded, endpoint, logit_bias=biases, reasoning_budget=4) == (40, 40)
    line_end = str(crowded.llm.tokenizer.encode("\n")[0])
    biases[line_end] = 8
    reported, _ = ask(crowded, endpoint, logit_bias=biases, reasoning_budget=4, max_tokens=130)
    assert 4 <= reported < 40  # a line ended, and with it the reasoning
    assert ask(crowded, endpoint, logit_bias=biases, reasoning_budget=4, reasoning_grace=0)[0] == 4


def test_the_count_stands_when_answers_are_preempted(crowded):
    body = {"logit_bias": free(crowded), "reasoning_budget": 16, "reasoning_grace": 0, "n": 6}
    before = crowded.llm.stats().preemptions
    assert ask(crowded, "chat", **body, max_tokens=130) == (6 * 16, 6 * 130)
    assert crowded.llm.stats().preemptions > before


def test_an_echo_alone_generates_nothing(served):
    ids = served.post("/tokenize", {"messages": QUESTION}).json()["tokens"]
    body = {"prompt": ids, "echo": True, "max_tokens": 0, "reasoning_budget": 5}
    usage = served.post("/v1/completions", body).json()["usage"]
    assert usage["completion_tokens"] == 0
    assert set(usage["completion_tokens_details"].values()) == {0}


def test_a_negative_grace_is_refused_before_a_server_starts():
    with pytest.raises(ConfigError, match="reasoning_grace is -1"):
        ServerSettings(reasoning_grace=-1)
