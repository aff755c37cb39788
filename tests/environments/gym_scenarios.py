"""Rollouts on resources servers of NeMo Gym, played by our client, real or from a recording.

`record_gym_fixtures.py` plays them on the real servers and writes what went over the wire; the
tests play them again on a server that answers with the recording, and want the same results. So
this module imports nothing that the environment of NeMo Gym lacks.
"""

import json
from pathlib import Path
from typing import Any

from nemotron3.environments import TaskResponse, Verification
from nemotron3.environments.gym_server import GymServerEnvironment, GymSession
from nemotron3.environments.http_client import HttpLimits

FIXTURES = Path(__file__).parent / "fixtures" / "gym"
LIMITS = HttpLimits(timeout_s=10, max_attempts=2, delay_s=0.0)


def environment_of_rows(url: str, rows: list[dict[str, Any]], folder: Path) -> GymServerEnvironment:
    """Our client of a server, all rows held out."""
    file, other = folder / "rows.jsonl", folder / "none.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    spare = {"responses_create_params": {"input": "nothing"}}
    other.write_text(json.dumps(spare) + "\n", encoding="utf-8")
    return GymServerEnvironment(url, other, held_out=file, agent="recorded", limits=LIMITS)


def call(name: str, /, **arguments: Any) -> dict[str, Any]:
    """A turn that calls one tool."""
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"role": "assistant", "tool_calls": [{"id": "call_a", "function": function}]}


def told(verification: Verification) -> dict[str, Any]:
    """A verification as data."""
    failure = verification.failure
    return {
        "reward": verification.reward,
        "components": dict(verification.components),
        "info": dict(verification.info),
        "failure": None if failure is None else str(failure.kind),
    }


async def _play(
    environment: GymServerEnvironment,
    turns: list[dict[str, Any]],
    *,
    cut: bool = False,
    session: GymSession | None = None,
) -> dict[str, Any]:
    """One rollout: what the tools said, and the verdict."""
    row = environment.task(0, split="held_out")
    if session is None:
        session = await environment.seed_session(row)
    messages: list[dict[str, Any]] = []
    said: list[str] = []
    for turn in turns:
        messages.append(turn)
        for each in turn.get("tool_calls", ()):
            name, arguments = each["function"]["name"], json.loads(each["function"]["arguments"])
            said.append(await environment.call_tool(session, name, arguments))
            messages.append({"role": "tool", "tool_call_id": each["id"], "content": said[-1]})
    response = TaskResponse.of(*messages, is_complete=not cut)
    return {"said": said, "verdict": told(await environment.verify(row, response, session))}


def _says(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "reasoning_content": "Hm.", "content": text}]


async def mcqa(environment: GymServerEnvironment) -> list[Any]:
    """Multiple choice: right, wrong, without a box, cut."""
    return [
        await _play(environment, _says("It is \\boxed{B}.")),
        await _play(environment, _says("\\boxed{A}")),
        await _play(environment, _says("B")),
        await _play(environment, _says(""), cut=True),
    ]


async def counter(environment: GymServerEnvironment) -> list[Any]:
    """A counter in each session: counted right, wrong, with wrong arguments, with no such tool."""
    add = [call("increment_counter", count=1), call("increment_counter", count=2)]
    wrong = [call("increment_counter", number="two"), call("verify"), call("get_counter_value")]
    done = {"role": "assistant", "content": "6"}
    row = environment.task(0, split="held_out")
    sessions = [await environment.seed_session(row) for _ in range(2)]  # each has its own count
    first = await _play(environment, [*add, call("get_counter_value"), done], session=sessions[0])
    second = await _play(
        environment, [add[0], call("get_counter_value"), done], session=sessions[1]
    )
    return [first, second, await _play(environment, [*wrong, done])]


async def workplace(environment: GymServerEnvironment) -> list[Any]:
    """Many tools: the right call, an argument that no tool takes, nothing done."""
    find = call("company_directory_find_email_address", name="carlos")
    search = call(
        "email_search_emails", query="Task Update on Develop prototype for report generation"
    )
    reply = call(
        "email_reply_email",
        email_id="00000057",
        body="Thanks for the update - I will get back to you tomorrow.",
    )
    done = {"role": "assistant", "content": "Done."}
    return [
        await _play(environment, [find, search, reply, done]),
        await _play(environment, [call("email_delete_email", nothing=1), done]),
        await _play(environment, [done]),
    ]


async def components(environment: GymServerEnvironment) -> list[Any]:
    """A reward of three components."""
    right = {"name": "get_weather", "arguments": '{"city": "San Francisco"}'}
    turn = {"role": "assistant", "tool_calls": [{"id": "call_a", "function": right}]}
    row = environment.task(0, split="held_out")
    verdicts: list[Any] = []
    for messages in ([turn], [{**turn, "content": "Look:"}], _says("Sunny.")):
        session = await environment.seed_session(row)
        response = TaskResponse.of(*messages)
        verdicts.append(told(await environment.verify(row, response, session)))
    return verdicts


SCENARIOS = {
    "mcqa": mcqa,
    "example_session_state_mgmt": counter,
    "workplace_assistant": workplace,
    "example_tool_call_multireward": components,
}
"""By the name of the resources server."""
