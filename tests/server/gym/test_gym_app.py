"""An environment as a resources server: what NeMo Gym's agents send, and what nobody should."""

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron3.environments import (
    BUILT_IN,
    Environment,
    FailureKind,
    RolloutFailedError,
    Verification,
    load_environment,
)
from nemotron3.environments.calculator import Calculator
from nemotron3.environments.gym_protocol import gym_row, verify_body
from nemotron3.environments.gym_server import GymServerEnvironment
from nemotron3.errors import ConfigError
from nemotron3.server.gym.app import GymSettings, create_gym_app
from nemotron3.server.gym.cookies import COOKIE
from nemotron3.text import Tool
from tests.environments.gym_scenarios import FIXTURES, LIMITS, SCENARIOS, environment_of_rows
from tests.server.gym.serving import Counter, get, post, serving


@pytest.fixture(scope="module")
def counter():
    with serving(Counter()) as (url, _):
        yield url


@pytest.fixture(scope="module")
def recorded():
    text = (FIXTURES / "example_session_state_mgmt.json").read_text("utf-8")
    return json.loads(text)


def test_requests_to_a_real_server_are_answered_alike(counter, recorded):
    """The same bodies in the same order, with our cookies: statuses, texts, fields and rewards."""
    cookies = {}
    for exchange in recorded["exchanges"]:
        request, wanted, session = exchange["request"], exchange["answer"], exchange["session"]
        sent = cookies.get(session, {}) if request["has_cookie"] else {}
        answer = post(counter, request["path"], request["body"], cookies=sent)
        cookies[session] = dict(answer.cookies)  # agents keep those of the last answer alone
        assert len(answer.cookies) == len(wanted["cookies"])
        if wanted["status"] == 422:  # ours says what is wrong in words that a policy reads
            assert answer.text == "error: the call has no count"
            continue
        assert answer.status_code == wanted["status"]
        if request["path"] != "/verify":
            assert answer.text == wanted["body"]
            continue
        ours, theirs = answer.json(), json.loads(wanted["body"])
        assert ours["reward"] == theirs["reward"]
        assert theirs.keys() - {"expected_count"} <= ours.keys()
        sent_items = request["body"]["response"]["output"]
        assert ours["response"]["output"] == sent_items
        for item, other in zip(sent_items, theirs["response"]["output"], strict=True):
            assert item | {"content": 0} == {name: other[name] for name in item} | {"content": 0}


def test_our_client_plays_a_recorded_scenario_on_our_server(counter, recorded, tmp_path):
    environment = environment_of_rows(counter, recorded["rows"], tmp_path)
    played = asyncio.run(SCENARIOS["example_session_state_mgmt"](environment))
    expected = recorded["results"]
    assert [each["verdict"] for each in played] == [each["verdict"] for each in expected]
    assert [each["said"] for each in played[:2]] == [each["said"] for each in expected[:2]]


def test_aggregated_metrics_have_the_names_and_values_of_a_real_server(counter, recorded):
    aggregated = recorded["aggregate_metrics"]
    answer = post(counter, "/aggregate_metrics", aggregated["request"]).json()
    theirs = aggregated["answer"]
    assert answer["agent_metrics"] == pytest.approx(theirs["agent_metrics"])
    assert answer["key_metrics"] == pytest.approx(theirs["key_metrics"])
    for ours, group in zip(
        answer["group_level_metrics"], theirs["group_level_metrics"], strict=True
    ):
        assert ours == {name: group[name] for name in ours}
        assert "mean/reward" in ours


def test_failed_verifications_are_in_no_mean_and_usage_is(counter):
    rollouts = [
        {
            "reward": 1.0,
            "reward_components": {"right": 1.0},
            "response": {"usage": {"output_tokens": 7}},
        },
        {"reward": 0.0, "_ng_failure_class": "judge_failed"},
    ]
    found = post(counter, "/aggregate_metrics", {"verify_responses": rollouts}).json()
    overall = found["agent_metrics"]
    assert overall["mean/reward"] == overall["mean/reward_components/right"] == 1.0
    assert overall["mean/output_tokens"] == 7
    assert overall["num_failed"] == 1
    empty = post(counter, "/aggregate_metrics", {"verify_responses": []}).json()
    assert empty == {"group_level_metrics": [], "agent_metrics": {}, "key_metrics": {}}


@pytest.mark.parametrize(
    ("rewards", "mean", "median", "deviation"),
    [
        ([1e308, 1e308], 1e308, 1e308, 0.0),
        ([1.5e308, -1.5e308], 0.0, 0.0, None),
        ([1.0e308, 0.0, 1.0], 1e308 / 3, 1.0, 1e308 / 3**0.5),
        ([10**400, 2.0, 4.0], 3.0, 3.0, 2**0.5),
    ],
)
def test_numbers_of_any_size_have_statistics(counter, rewards, mean, median, deviation):
    """What no float holds is null; an integer beyond all floats is no measurement."""
    rollouts = [{"reward": reward} for reward in rewards]
    answer = post(counter, "/aggregate_metrics", {"verify_responses": rollouts})
    assert answer.status_code == 200
    overall = answer.json()["agent_metrics"]
    assert overall["mean/reward"] == pytest.approx(mean)
    assert overall["median/reward"] == pytest.approx(median)
    found = overall["std/reward"]
    assert found is None if deviation is None else found == pytest.approx(deviation)


def served_and_direct(name, folder, *, num_tasks=6):
    """The same rollouts through HTTP and in this process: tools' answers and verifications."""
    environment = load_environment(name, difficulty=0.5)
    rows = environment.distinct_tasks(num_tasks)

    async def played(made, task):
        solution = environment.solve(task)
        response, session = await made.play(task, solution)
        return response, await made.verify(task, response, session)

    file, other = folder / "rows.jsonl", folder / "other.jsonl"
    file.write_text("".join(json.dumps(gym_row(row)) + "\n" for row in rows), encoding="utf-8")
    other.write_text(json.dumps(environment.row("other")) + "\n", encoding="utf-8")
    with serving(environment) as (url, server):
        remote = GymServerEnvironment(url, file, held_out=other, limits=LIMITS)
        for index, row in enumerate(rows):
            task = remote.task(index)
            assert {k: v for k, v in task.items() if k != "responses_create_params"} == {
                k: v for k, v in row.items() if k != "responses_create_params"
            }
            yield asyncio.run(played(remote, task)), asyncio.run(played(environment, row))
        assert len(server.sessions) == num_tasks


SERVABLE = [name for name, kind in BUILT_IN.items() if kind.step is Environment.step]


@pytest.mark.parametrize("name", SERVABLE)
def test_every_environment_is_the_same_through_http(name, tmp_path):
    for (response, verification), (direct, wanted) in served_and_direct(name, tmp_path):
        assert response == direct
        assert verification.reward == wanted.reward == 1.0
        assert verification.components == wanted.components


def test_sessions_are_apart_and_named_by_random_cookies(counter):
    rows = [Counter().row("x", initial_count=n, expected_count=n + 1) for n in (5, 50)]
    seeded = [post(counter, "/seed_session", row) for row in rows]
    cookies = [dict(answer.cookies) for answer in seeded]
    assert [each.json() for each in seeded] == [{}, {}]
    assert all(len(each[COOKIE]) >= 32 for each in cookies)
    assert cookies[0] != cookies[1]
    assert "httponly" in seeded[0].headers["set-cookie"].lower()
    post(counter, "/increment_counter", {"count": 1}, cookies=cookies[1])
    values = [post(counter, "/get_counter_value", cookies=each).text for each in cookies]
    assert values == ['{"count":5}', '{"count":51}']


def test_every_answer_to_a_session_has_its_cookie(counter):
    row = Counter().row("x", initial_count=0, expected_count=0)
    cookies = dict(post(counter, "/seed_session", row).cookies)
    body = {**row, "response": {"output": []}}
    for path, content in (
        ("/nothing", {}), ("/increment_counter", {"count": "1"}), ("/increment_counter", []),
        ("/verify", {}), ("/verify", b"{"), ("/a/b", {}), ("/verify", body),
    ):  # fmt: skip
        headers = {"Content-Type": "application/json"} if content == b"{" else {}
        answer = post(counter, path, content, cookies=cookies, headers=headers)
        assert dict(answer.cookies) == cookies, path
    assert not post(counter, "/nothing", {}).cookies
    forged = {"Cookie": f"{COOKIE}=no session; {COOKIE}x=1"}
    assert not post(counter, "/nothing", {}, headers=forged).cookies


def verifiable(**changes):
    row = Counter().row("x", initial_count=1, expected_count=1)
    response = {"output": [], "status": "completed"}
    return {**row, "response": response, **changes}


BAD = {
    "a row that is none": ("/seed_session", {"x": 1}, 422, "responses_create_params"),
    "a prompt that is none": (
        "/seed_session",
        {"responses_create_params": {"input": [{"role": "user", "content": 3}]}},
        422,
        r"input[0].content",
    ),
    "a list": ("/seed_session", [1], 422, "an object was expected"),
    "no response": ("/verify", {**verifiable(), "response": None}, 422, "response"),
    "no items": ("/verify", verifiable(response={"output": 3}), 422, "response.output"),
    "an item of a kind": (
        "/verify",
        verifiable(response={"output": [{"type": "image"}]}),
        422,
        "response.output[0].type",
    ),
    "no session to verify": ("/verify", verifiable(), 400, "call /seed_session first"),
    "no session to call in": ("/get_counter_value", {}, 400, "call /seed_session first"),
    "arguments that are none": ("/get_counter_value", [], 422, "an object was expected"),
    "no such tool": ("/nothing", {}, 404, "there is no tool nothing"),
    "rollouts that are none": ("/aggregate_metrics", {}, 422, "verify_responses"),
    "a rollout that is none": ("/aggregate_metrics", {"verify_responses": [1]}, 422, "[0]"),
}


@pytest.mark.parametrize(("path", "body", "status", "said"), BAD.values(), ids=BAD.keys())
def test_bad_requests_are_told_what_is_wrong(counter, path, body, status, said):
    answer = post(counter, path, body)
    assert answer.status_code == status, answer.text
    assert said in answer.text
    if answer.headers["content-type"].startswith("application/json"):
        assert "detail" in answer.json()


def test_bodies_that_are_no_json_are_refused(counter):
    for content, kind, status in (
        (b"{", "application/json", 400), (b'{"x": NaN}', "application/json", 400),
        (b"{}", "text/plain", 415), (b"[" * 10**5, "application/json", 400),
    ):  # fmt: skip
        headers = {"Content-Type": kind}
        answer = post(counter, "/verify", content, headers=headers)
        assert answer.status_code == status, answer.text
    with serving(Counter(), max_body_bytes=100) as (url, _):
        assert post(url, "/seed_session", {"x": "y" * 100}).status_code == 413


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
items = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["message", "reasoning", "function_call", "function_call_output"]),
        "role": st.sampled_from(["assistant", "user", "tool"]) | json_values,
        "content": json_values,
        "summary": json_values,
        "name": json_values,
        "arguments": json_values,
        "call_id": json_values,
        "output": json_values,
    },
)


@settings(max_examples=60, deadline=None)
@given(
    path=st.sampled_from(["/seed_session", "/verify", "/increment_counter", "/aggregate_metrics"]),
    body=json_values
    | st.builds(
        lambda output: verifiable(response={"output": output}), st.lists(items, max_size=3)
    ),
    with_session=st.booleans(),
)
def test_no_body_crashes_the_server(counter, path, body, with_session):
    row = Counter().row("x", initial_count=1, expected_count=1)
    cookies = dict(post(counter, "/seed_session", row).cookies) if with_session else {}
    answer = post(counter, path, body, cookies=cookies)
    assert answer.status_code < 500, answer.text
    assert get(counter, "/health").status_code == 200


@pytest.mark.parametrize("name", SERVABLE)
def test_rows_of_others_are_refused_with_the_field(name):
    row = {"responses_create_params": {"input": "2+2?", "tools": []}}
    with serving(load_environment(name)) as (url, _):
        seeded = post(url, "/seed_session", row)
        body = row | {"response": {"output": [{"role": "assistant", "content": "4"}]}}
        judged = post(url, "/verify", body, cookies=dict(seeded.cookies))
    refused = judged if seeded.status_code == 200 else seeded
    assert refused.status_code == 422, refused.text
    assert "the row's " in refused.json()["detail"][0]["msg"]


def test_numbers_of_any_size_pass(counter):
    body = json.dumps({"responses_create_params": {"input": "x"}}).replace(
        '"x"', '"x"}, "n": {"m": ' + "9" * 5000
    )
    headers = {"Content-Type": "application/json"}
    with serving(Calculator()) as (url, _):
        answer = post(url, "/seed_session", body.encode(), headers=headers)
        assert answer.status_code < 500, answer.text


def test_what_a_policy_gets_wrong_is_judged_and_no_error():
    environment = Calculator()
    row = environment.task(0)
    calls = [
        {"type": "function_call", "call_id": "a", "name": "calculate", "arguments": "{no json"},
        {"type": "function_call", "call_id": "b", "name": "<x>\n" * 200, "arguments": "[1]"},
        {"type": "function_call", "call_id": "c", "name": "", "arguments": "[" * 10**5},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "4"}]},
    ]
    with serving(environment) as (url, _):
        cookies = dict(post(url, "/seed_session", row).cookies)
        body = {**row, "response": {"output": calls}}
        answer = post(url, "/verify", body, cookies=cookies)
    assert (answer.status_code, answer.json()["reward"]) == (200, 0.0)
    assert answer.json()["response"] == body["response"]


class Unreliable(Counter):
    """What fails in it says the row."""

    name = "unreliable"

    async def seed_session(self, row):
        if row.get("fails") == "seed_session":
            raise RolloutFailedError(FailureKind.ENVIRONMENT, "no memory")
        return {"count": row.get("initial_count", 0), "fails": row.get("fails")}

    async def run_tool(self, session, name, arguments):
        if session["fails"] == "tool":
            raise RolloutFailedError(FailureKind.TOOL, "the tool is down")
        if session["fails"] == "bug":
            raise RuntimeError("a bug of the environment")
        return await super().run_tool(session, name, arguments)

    async def verify(self, row, response, session):
        if row.get("fails") == "judge":
            return Verification.failed(FailureKind.JUDGE, "no answer of the judge")
        return await super().verify(row, response, session)


def test_failures_are_told_in_the_way_of_nemo_gym(tmp_path, caplog):
    environment = Unreliable()
    row = environment.row("x", initial_count=1, expected_count=1)
    with serving(environment) as (url, _):

        def played(fails):
            given = {**row, "fails": fails}
            cookies = dict(post(url, "/seed_session", given).cookies)
            said = post(url, "/get_counter_value", cookies=cookies)
            body = {**given, "response": {"output": []}}
            return said, post(url, "/verify", body, cookies=cookies).json()

        _, judged = played("judge")
        assert judged["_ng_failure_class"] == "judge_failed"
        assert judged["_ng_failure_judge_error"] == "no answer of the judge"
        assert judged["reward"] == 0.0
        said, judged = played("tool")
        assert said.status_code == 500
        assert "no reward is given" in said.text
        assert judged["_ng_failure_class"] == "tool_failed"
        said, _ = played("bug")
        assert said.status_code == 500
        assert "a bug of" not in said.text
        assert "a bug of the environment" in caplog.text
        seeded = post(url, "/seed_session", {**row, "fails": "seed_session"})
        assert (seeded.status_code, "no memory" in seeded.text) == (500, True)
        said, judged = played(None)
        assert (said.text, judged["reward"]) == ('{"count":1}', 1.0)
        assert "_ng_failure_class" not in judged


def test_a_stateless_environment_verifies_without_a_session():
    environment = load_environment("math")
    row = environment.task(0)
    response = asyncio.run(environment.demonstration(row))
    with serving(environment) as (url, _):
        answer = post(url, "/verify", verify_body(gym_row(row), response))
        assert (answer.status_code, answer.json()["reward"]) == (200, 1.0)
        assert answer.json()["reward_components"]["correct"] == 1.0
        assert get(url, "/reverify_mode").json() == "stateless"
        about = get(url, "/").json()
        assert (about["environment"], about["status"], about["tools"]) == ("math", "ok", [])
        assert 'nemotron3_http_requests_total{path="/verify"' in get(url, "/metrics").text
        paths = get(url, "/openapi.json").json()["paths"]
        assert {"/seed_session", "/verify", "/aggregate_metrics", "/health"} <= paths.keys()


def test_environments_that_agents_of_nemo_gym_cannot_play_are_refused():
    class Grouped(Counter):
        compares_responses = True

    class Clashing(Counter):
        tools = (Tool(name="verify"),)

    for environment, said in (
        (Grouped(), "judges the responses of a task together"),
        (load_environment("guess_number"), "after a turn that calls no tool"),
        (Clashing(), "has a tool 'verify', which is an address"),
    ):
        with pytest.raises(ConfigError, match=said):
            create_gym_app(environment, GymSettings())
