"""Our client of NeMo Gym's resources servers: recordings of real ones, and servers that fail."""

import asyncio
import json
from collections import defaultdict

import pytest

from nemotron3.environments import RolloutFailedError, TaskResponse, load_environment
from nemotron3.environments.gym_server import GymServerEnvironment, files_at
from nemotron3.environments.http_client import HttpLimits
from nemotron3.environments.registry import environment_files
from nemotron3.errors import ConfigError, DataError
from tests.environments.fake_gym import Answer, fake_server
from tests.environments.gym_scenarios import FIXTURES, LIMITS, SCENARIOS, environment_of_rows

ANSWER = TaskResponse.of({"role": "assistant", "content": "4"})


def row(text="2+2?", *, agent=None, tools=(), **fields):
    named = {} if agent is None else {"agent_ref": {"type": "responses_api_agents", "name": agent}}
    tools = [{"type": "function", "name": name, "parameters": {}, "strict": True} for name in tools]
    params = {"input": [{"role": "user", "content": text}], "tools": tools}
    return {"responses_create_params": params, **named, **fields}


def write(folder, name, rows):
    file = folder / name
    file.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return file


@pytest.mark.parametrize("name", SCENARIOS)
def test_recordings_of_real_servers_are_played_again(name, tmp_path):
    fixture = json.loads((FIXTURES / f"{name}.json").read_text("utf-8"))
    assert fixture["nemo_gym"] == "0.4.0"
    exchanges = iter(fixture["exchanges"])
    tokens = defaultdict(int)

    def respond(request):
        exchange = next(exchanges)
        wanted, recorded, session = exchange["request"], exchange["answer"], exchange["session"]
        assert request.path == wanted["path"]
        assert request.body == wanted["body"]
        cookies = [f"{each}={session}.{tokens[session]}" for each in recorded["cookies"]]
        assert request.cookie == ("; ".join(cookies) if wanted["has_cookie"] else None)
        tokens[session] += 1  # the cookie changes with each answer, as Starlette's do
        renewed = dict.fromkeys(recorded["cookies"], f"{session}.{tokens[session]}")
        return Answer(recorded["body"], recorded["status"], renewed)

    with fake_server(respond) as url:
        environment = environment_of_rows(url, fixture["rows"], tmp_path)
        assert asyncio.run(SCENARIOS[name](environment)) == fixture["results"]
    assert next(exchanges, None) is None


def played(environment, index=0, *, tools=()):
    """One rollout with calls of tools, on a loop of its own."""

    async def play():
        task = environment.task(index)
        session = await environment.seed_session(task)
        said = [await environment.call_tool(session, name, {"x": 1}) for name in tools]
        return said, await environment.verify(task, ANSWER, session)

    return asyncio.run(play())


FAILURES = {
    "tagged by the judge": (
        {"reward": 0.0, "_ng_failure_class": "judge_failed", "_ng_failure_judge_error": "no route"},
        "judge_failed",
        "no route",
    ),
    "tagged by something new": (
        {"reward": 1.0, "_ng_failure_class": "gpu_on_fire"},
        "environment_failed",
        "gpu_on_fire: the server does not say why",
    ),
    "no reward": ({"said": "ok"}, "environment_failed", "reward is None"),
    "a reward that is no number": ({"reward": "1"}, "environment_failed", "reward is '1'"),
    "a reward that is not finite": ('{"reward": NaN}', "environment_failed", "reward is nan"),
    "no object": ([1.0], "environment_failed", "no object"),
    "no JSON": ("<html>", "environment_failed", "is not JSON: '<html>'"),
}


@pytest.mark.parametrize(("body", "kind", "why"), FAILURES.values(), ids=FAILURES.keys())
def test_a_failed_verification_is_no_reward(body, kind, why, tmp_path):
    file = write(tmp_path, "rows.jsonl", [row(), row("3+3?")])

    def respond(request):
        return Answer(body if request.path == "/verify" else {})

    with fake_server(respond) as url:
        _, verification = played(environment(url, file, tmp_path))
    assert verification.reward is None
    assert verification.failure.kind == kind
    assert why in verification.failure.message


def environment(url, file, folder, **options):
    other = write(folder, "held.jsonl", [row("held out")])
    return GymServerEnvironment(
        url, file, held_out=other, limits=options.pop("limits", LIMITS), **options
    )


def test_rewards_components_and_what_else_the_server_says(tmp_path):
    file = write(tmp_path, "rows.jsonl", [row(expected_answer="4")])

    def respond(request):
        if request.path == "/seed_session":
            return Answer({})
        parts = {"right": 1, "short": False, "none": None}
        said = {"reward": 0.5, "reward_components": parts, "extracted": "4" * 500, "list": [1]}
        return Answer({**request.body, **said})

    with fake_server(respond) as url:
        _, verification = played(environment(url, file, tmp_path))
    assert verification.reward == 0.5
    assert verification.components == {"right": 1.0, "short": 0.0}
    assert verification.info == {"extracted": "4" * 200}


@pytest.mark.parametrize("trouble", [Answer(drop=True), Answer("broken", 500), Answer("busy", 503)])
@pytest.mark.parametrize("path", ["/seed_session", "/verify"])
def test_what_may_be_repeated_is_repeated_and_then_fails(path, trouble, tmp_path):
    file = write(tmp_path, "rows.jsonl", [row()])
    counts = defaultdict(int)

    def respond(request):
        counts[request.path] += 1
        is_bad = request.path == path and counts[path] <= bad
        return trouble if is_bad else Answer({"reward": 1.0})

    with fake_server(respond) as url:
        bad = 1
        assert played(environment(url, file, tmp_path))[1].reward == 1.0
        assert counts[path] == 2
        counts.clear()
        bad = 99
        kind = "judge_failed" if path == "/verify" else "environment_failed"
        with pytest.raises(RolloutFailedError, match=rf"{path} .*, 2 times") as failed:
            played(environment(url, file, tmp_path))
        assert failed.value.failure.kind == kind
        assert counts[path] == LIMITS.max_attempts


@pytest.mark.parametrize(
    ("trouble", "times"),
    [(Answer(drop=True), 1), (Answer("broken", 500), 1), (Answer("busy", 503), 2)],
)
def test_a_call_is_never_executed_twice(trouble, times, tmp_path):
    file = write(tmp_path, "rows.jsonl", [row(tools=["add"])])
    calls = []

    def respond(request):
        if request.path == "/add":
            calls.append(request.body)
            return trouble
        return Answer({})

    with fake_server(respond) as url, pytest.raises(RolloutFailedError) as failed:
        played(environment(url, file, tmp_path), tools=["add"])
    assert failed.value.failure.kind == "tool_failed"
    assert calls == [{"x": 1}] * times


def test_a_policy_calls_what_its_row_offers_and_reads_what_the_server_says(tmp_path):
    rows = [row(tools=["add", "a b/../verify"]), row("other", tools=["subtract"])]
    file = write(tmp_path, "rows.jsonl", rows)
    paths = []

    def respond(request):
        paths.append(request.path)
        return Answer('{"detail":"no"}', 422) if "add" in request.path else Answer({"reward": 0})

    with fake_server(respond) as url:
        made = environment(url, file, tmp_path)
        assert {tool.name for tool in made.tools} == {"add", "subtract", "a b/../verify"}
        said, _ = played(made, tools=["add", "subtract", "verify", "a b/../verify"])
    assert said[:3] == [
        '{"detail":"no"}',
        *(f"error: there is no tool {n}" for n in ("subtract", "verify")),
    ]
    assert paths == ["/seed_session", "/add", "/a%20b%2F..%2Fverify", "/verify"]


def test_a_row_that_the_server_refuses_ends_the_run(tmp_path):
    file = write(tmp_path, "rows.jsonl", [row()])
    detail = {"detail": [{"type": "missing", "loc": ["body", "expected_answer"]}]}
    for path in ("/seed_session", "/verify"):
        with (
            fake_server(
                lambda r, p=path: Answer(detail, 422) if r.path == p else Answer({})
            ) as url,
            pytest.raises(
                DataError, match=r"answered 422: .*expected_answer.*rows\.jsonl those of"
            ),
        ):
            played(environment(url, file, tmp_path))
    with (
        fake_server(lambda _: Answer({"detail": "Not Found"}, 404)) as url,
        pytest.raises(ConfigError, match="no resources server"),
    ):
        played(environment(url, file, tmp_path))
    with (
        fake_server(lambda _: Answer({"detail": "no session"}, 400)) as url,
        pytest.raises(RolloutFailedError, match="no session"),
    ):
        played(environment(url, file, tmp_path))


def test_a_server_that_is_not_there_or_is_none_is_told_before_work_starts(tmp_path):
    file = write(tmp_path, "rows.jsonl", [row()])
    with fake_server(lambda _: Answer({})) as url:
        pass
    with pytest.raises(ConfigError, match=r"found nobody .*is the server running\?"):
        environment(url, file, tmp_path)
    described = {"paths": {"/v1/chat/completions": {}}}
    with (
        fake_server(lambda _: Answer({}), described=described) as url,
        pytest.raises(ConfigError, match=r"no /verify \(it has /v1/chat/completions\)"),
    ):
        environment(url, file, tmp_path)
    with fake_server(lambda _: Answer({}), described="no JSON") as url:
        environment(url, file, tmp_path)  # it need not describe itself
    for wrong in ("127.0.0.1:8001", "ftp://x", "http://", "http://u@x:1", "http://x:99999"):
        with pytest.raises(ConfigError, match="is no address of a server"):
            environment(wrong, file, tmp_path)
    with pytest.raises(ConfigError, match=r"found nobody|failed"):
        environment("http://a..b:1", file, tmp_path)


WRONG_ROWS = {
    "no JSON": ("{", "line 1: Expecting"),
    "no object": ("[]", "line 1: is of type list"),
    "no prompt": ("{}", "line 1: the row has no responses_create_params"),
    "a reserved tool": (json.dumps(row(tools=["verify"])), "has a tool 'verify'"),
    "nothing": ("\n", "has no rows"),
    "two agents": (
        "\n".join(json.dumps(row(agent=name)) for name in "ab"),
        r"rows for 2 agents \(a, b\); choose one",
    ),
}


@pytest.mark.parametrize(("text", "said"), WRONG_ROWS.values(), ids=WRONG_ROWS.keys())
def test_files_of_rows_that_cannot_be_used(text, said, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=said):
        GymServerEnvironment("http://127.0.0.1:1", file)
    with pytest.raises(DataError, match="cannot be read"):
        GymServerEnvironment("http://127.0.0.1:1", tmp_path / "none.jsonl")


def test_rows_come_in_the_order_of_the_file_and_sides_are_apart(tmp_path):
    rows = [row(f"{number}?", agent="sums") for number in range(40)]
    file = write(tmp_path, "rows.jsonl", [*rows, row("of others", agent="words")])
    with fake_server(lambda _: Answer({})) as url:
        made = load_environment(f"{file}@{url}?agent=sums")
        assert made.name == "sums"
        sides = {}
        for side in ("train", "held_out"):
            texts = [made.task(i, split=side)["responses_create_params"] for i in range(40)]
            sides[side] = [each["input"][0]["content"] for each in texts]
        train, held_out = (list(dict.fromkeys(sides[side])) for side in ("train", "held_out"))
        assert sorted(train + held_out) == sorted(f"{number}?" for number in range(40))
        assert train == sorted(train, key=lambda text: int(text[:-1]))
        assert sides["train"] == (train * 2)[:40]
        assert len(made.distinct_tasks(len(held_out))) == len(held_out)
        with pytest.raises(DataError, match=r"wanted; ask for fewer \(in a run: --held-out-tasks"):
            made.distinct_tasks(len(held_out) + 1)
        with pytest.raises(DataError, match="1 prompts are in"):
            GymServerEnvironment(
                url, write(tmp_path, "a", [row("x")]), held_out=write(tmp_path, "b", [row("x")])
            )
        alone = GymServerEnvironment(url, write(tmp_path, "a", [row("held out")]))
        assert alone.name in url
        empty = "train" if alone._rows["held_out"] else "held_out"
        with pytest.raises(DataError, match=f"has no {empty} rows"):
            alone.task(0, split=empty)


def test_addresses_on_the_command_line(tmp_path):
    file, other = write(tmp_path, "rows.jsonl", [row()]), write(tmp_path, "held", [row("x")])
    with fake_server(lambda _: Answer({})) as url:
        made = load_environment(f"{file}@{url}?held_out={other}&max_turns=3&timeout_s=1.5&agent=a")
        assert (made.max_turns, made.name) == (3, "a")
        assert made.task(0, split="held_out")["agent_ref"]["name"] == "a"
        assert files_at(f"{file}@{url}?held_out={other}") == [file, other]
        with pytest.raises(ConfigError, match="leave difficulty out"):
            load_environment(f"{file}@{url}", difficulty=0.1)
        for options, said in {
            "max_turn=3": "no option 'max_turn'",
            "max_turns=many": "max_turns is 'many', no number",
            "max_turns=0": "max_turns is 0",
            "timeout_s=0": "timeout_s is 0",
        }.items():
            with pytest.raises(ConfigError, match=said):
                load_environment(f"{file}@{url}?{options}")
    with pytest.raises(ConfigError, match="names a server and no rows; write ROWS@URL"):
        load_environment("http://127.0.0.1:8001")
    assert environment_files("math") == []
    assert environment_files("my.py")[0].name == "my.py"


def test_limits_are_checked():
    for name in ("timeout_s", "max_attempts", "max_connections", "max_body_bytes"):
        with pytest.raises(ConfigError, match=name):
            HttpLimits(**{name: 0})
    with pytest.raises(ConfigError, match="delay_s"):
        HttpLimits(delay_s=-1)


def test_answers_too_large_and_redirections_are_failures(tmp_path):
    file = write(tmp_path, "rows.jsonl", [row()])
    small = HttpLimits(max_body_bytes=100, max_attempts=1)
    for answer, said in (
        (Answer("x" * 101), "more than 100 bytes"),
        (Answer({}, 307, headers={"Location": "http://elsewhere"}), "to http://elsewhere"),
    ):
        with (
            fake_server(lambda _, a=answer: a) as url,
            pytest.raises(RolloutFailedError, match=said),
        ):
            played(environment(url, file, tmp_path, limits=small))
