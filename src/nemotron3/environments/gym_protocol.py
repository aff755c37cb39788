"""The bodies that NeMo Gym's agents and resources servers exchange over HTTP.

A resources server has `/seed_session` (a row, answered with the cookie of a session), an address
for each tool (its arguments, answered with what the policy reads) and `/verify` (the row and a
response of OpenAI's Responses API, answered with the same and a `reward`). A verification that
failed has `_ng_failure_class` beside a reward of 0 that nobody may use.

Source: NeMo Gym 0.4 to 0.5 (github.com/NVIDIA-NeMo/Gym), `nemo_gym/base_resources_server.py`,
`nemo_gym/judge.py`, `responses_api_agents/simple_agent/app.py`.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from nemotron3.environments.response import Item, TaskResponse
from nemotron3.environments.rows import Row
from nemotron3.environments.verification import FailureKind, Verification
from nemotron3.errors import DataError
from nemotron3.text.messages import MAX_NAME

SEED_SESSION, VERIFY, AGGREGATE_METRICS = "seed_session", "verify", "aggregate_metrics"
RESERVED = frozenset(
    {SEED_SESSION, VERIFY, AGGREGATE_METRICS, "reverify_mode", "mcp", "health", "metrics", ""}
)
"""Addresses of a server that no tool may have: a policy could verify itself."""

TASK_INDEX = "_ng_task_index"
FAILURE_CLASS = "_ng_failure_class"
_JUDGE_ERROR, _OTHER_ERROR = "_ng_failure_judge_error", "_ng_failure_error"
_MAX_TEXT = 200
"""Characters that are kept of a text in `Verification.info`."""


def gym_row(row: Row, *, agent: str | None = None) -> Row:
    """A row as NeMo Gym's files have it, for an agent of another name.

    Its tools say whether they are `strict`, which NeMo Gym's types require.
    """
    params = cast(Mapping[str, Any], row["responses_create_params"])
    tools = [{"strict": False, **tool} for tool in params.get("tools") or ()]
    reference = cast(Mapping[str, Any], row["agent_ref"])
    named = reference if agent is None else {**reference, "name": agent}
    return {**row, "responses_create_params": {**params, "tools": tools}, "agent_ref": dict(named)}


def verify_body(row: Row, response: TaskResponse) -> dict[str, Any]:
    """The body of `/verify`: a row and a whole response of OpenAI's Responses API."""
    params = cast(Mapping[str, Any], row["responses_create_params"])
    said = response.to_gym()
    return {
        **row,
        "response": {
            "id": "resp_0",
            "object": "response",
            "created_at": 0,
            "model": "policy",
            "output": [_with_id(item, place) for place, item in enumerate(said["output"])],
            "status": said["status"],
            "incomplete_details": None if response.is_complete else {"reason": "max_output_tokens"},
            "parallel_tool_calls": params.get("parallel_tool_calls", True),
            "tool_choice": params.get("tool_choice", "auto"),
            "tools": params.get("tools") or [],
        },
    }


def read_verification(result: Any, row: Row) -> Verification:
    """What the answer of `/verify` says; one that says nothing of the policy is a failure."""
    if not isinstance(result, Mapping):
        return _no_reward(f"the answer is of type {type(result).__name__}, no object")
    fields = cast(Mapping[str, Any], result)
    if (failed := fields.get(FAILURE_CLASS)) is not None:
        why = fields.get(_JUDGE_ERROR) or fields.get(_OTHER_ERROR) or "the server does not say why"
        return Verification.failed(_failure_kind(failed), f"{failed}: {why}")
    reward = _number(fields.get("reward"))
    if reward is None:
        return _no_reward(f"reward is {fields.get('reward')!r}, a finite number was expected")
    given = fields.get("reward_components")
    parts = cast(Mapping[str, Any], given) if isinstance(given, Mapping) else {}
    components = {
        name: value for name, each in parts.items() if (value := _number(each)) is not None
    }
    info = {
        name: value[:_MAX_TEXT] if isinstance(value, str) else value
        for name, value in fields.items()
        if name not in row and name != "reward" and isinstance(value, str | int | float | bool)
    }
    return Verification(reward=reward, components=components, info=info)


def write_verification(body: Mapping[str, Any], verification: Verification) -> dict[str, Any]:
    """The answer of `/verify`: its body with the reward, or with the class of the failure."""
    failure = verification.failure
    if failure is None:
        parts = dict(verification.components)
        return {
            **body,
            "reward": verification.reward,
            **({"reward_components": parts} if parts else {}),
        }
    key = _JUDGE_ERROR if failure.kind is FailureKind.JUDGE else _OTHER_ERROR
    return {**body, "reward": 0.0, FAILURE_CLASS: str(failure.kind), key: failure.message}


def read_response(body: Mapping[str, Any]) -> TaskResponse:
    """The response in a body of `/verify`; raises `DataError` with the place of what is wrong.

    What a policy can do wrong is no error: arguments that are not JSON are none, as they are for
    our own rollouts, and a name that no tool can have names no tool.
    """
    response = body.get("response")
    if not isinstance(response, Mapping):
        raise DataError("is no object; give the response of the model", field="response")
    given = cast(Mapping[str, Any], response)
    output = given.get("output")
    if isinstance(output, Sequence) and not isinstance(output, str):
        given = {**given, "output": [_readable(item) for item in cast(Sequence[Any], output)]}
    return TaskResponse.from_gym(given)


def arguments_of(text: Any) -> dict[str, Any]:
    """The arguments of a call; those that are no JSON object are none."""
    try:
        found: Any = json.loads(text) if isinstance(text, str) and text else text
    except (ValueError, RecursionError):
        return {}
    return cast(dict[str, Any], found) if isinstance(found, dict) else {}


def _with_id(item: Item, place: int) -> Item:
    """An item of the assistant with the id that the types of the Responses API require."""
    prefixes = {"reasoning": "rs", "function_call": "fc"}
    if item["type"] == "message" and item["role"] == "assistant":
        return {"id": f"msg_{place}", "status": "completed", **item}
    prefix = prefixes.get(item["type"])
    return item if prefix is None else {"id": f"{prefix}_{place}", **item}


def _readable(item: Any) -> Any:
    if not isinstance(item, Mapping):
        return item
    fields = cast(Mapping[str, Any], item)
    if fields.get("type") != "function_call":
        return fields
    name = re.sub(r"[<>\n]", "", str(fields.get("name") or ""))[:MAX_NAME].strip()
    arguments = json.dumps(arguments_of(fields.get("arguments")))
    return {**fields, "name": name or "unnamed", "arguments": arguments}


def _failure_kind(name: Any) -> FailureKind:
    try:
        return FailureKind(name)
    except ValueError:
        return FailureKind.ENVIRONMENT


def _no_reward(why: str) -> Verification:
    return Verification.failed(FailureKind.ENVIRONMENT, f"/verify: {why}")


def _number(value: Any) -> float | None:
    """A finite number, true and false among them; None for anything else."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
