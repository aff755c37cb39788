"""Whatever the description of the server allows or forbids, no request makes the server fail.

schemathesis makes requests from /openapi.json, right ones and wrong ones, for as long as is said
below. The context is short, so that a request that happens to be right is soon answered.
"""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from tests.server.serving import running

EXAMPLES = 12
"""Requests of each kind to each operation; ten times as many found nothing more."""

OPERATIONS = {
    "GET": ["/health", "/metrics", "/v1/models", "/v1/models/{model}"],
    "POST": [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/tokenize",
        "/detokenize",
    ],
}
EVERY = [(method, path) for method, paths in OPERATIONS.items() for path in paths]


@pytest.fixture(scope="module")
def described(model_folder):
    with running(model_folder, max_model_len=80, max_num_seqs=4) as server:
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(("method", "path"), EVERY)
def test_nothing_that_is_sent_makes_the_server_fail(described, method, path, mode):
    operation = described[path][method]
    if mode is GenerationMode.NEGATIVE and method == "GET":
        return  # nothing in them can be wrong
    statuses = set()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case):
        answer = case.call()
        case.validate_response(answer, checks=[not_a_server_error])
        statuses.add(answer.status_code)

    send()
    assert statuses
    if mode is GenerationMode.NEGATIVE:
        assert all(400 <= status < 500 for status in statuses), statuses


def test_the_description_names_what_bodies_take(served):
    described = served.get("/openapi.json").json()
    paths = described["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses"} <= set(paths)
    chat = described["components"]["schemas"]["ChatBody"]
    assert chat["additionalProperties"] is False
    assert {"messages", "reasoning_budget", "chat_template_kwargs"} <= set(chat["properties"])
    assert "functions" not in chat["properties"]
    assert "429" in paths["/v1/chat/completions"]["post"]["responses"]
