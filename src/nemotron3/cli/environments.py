"""`nemotron3 env`: the environments there are, their tasks, whether they are sound, a server."""

import argparse
import asyncio
import json
import logging
from itertools import islice
from typing import Any

from nemotron3.environments import (
    BUILT_IN,
    Environment,
    EnvironmentReport,
    Row,
    check_environment,
    load_environment,
    prompt_of,
    tools_of,
)
from nemotron3.environments.gym_protocol import gym_row
from nemotron3.environments.response import to_dict
from nemotron3.errors import ConfigError, DependencyMissingError
from nemotron3.text import AssistantMessage, Message, SystemMessage, ToolMessage

_ROLES: dict[type[Message], str] = {SystemMessage: "system", ToolMessage: "tool"}


def env_command(known: argparse.Namespace) -> int:
    """List environments; show, write or solve tasks of one; check it; serve it."""
    if known.action == "list":
        _list()
        return 0
    if known.action == "serve":
        return _serve(load_environment(known.name, difficulty=known.difficulty), known)
    if known.num_tasks < 1:
        raise ConfigError(f"--num-tasks is {known.num_tasks}; it must be 1 or more")
    environment = load_environment(known.name, difficulty=known.difficulty)
    if known.action == "tasks":
        return _write_tasks(environment, known)
    if known.action == "show":
        for row in islice(environment.tasks(known.split, known.seed), known.num_tasks):
            print(asyncio.run(_shown(environment, row)))
        return 0
    if known.action == "demonstrations":
        for row in islice(environment.tasks(known.split, known.seed), known.num_tasks):
            print(
                json.dumps(
                    asyncio.run(_demonstration(environment, row, with_tools=known.with_tools))
                )
            )
        return 0
    report = asyncio.run(check_environment(environment, num_tasks=known.num_tasks, seed=known.seed))
    print(_page(environment, report))
    if not environment.has_demonstrations:
        return 1 if report.num_failures else 0
    return 0 if report.demonstration_reward == 1 else 1


def _list() -> None:
    width = max(map(len, BUILT_IN))
    for name, kind in BUILT_IN.items():
        print(f"{name:<{width}}  {(kind.__doc__ or '').splitlines()[0]}")


def _write_tasks(environment: Environment, known: argparse.Namespace) -> int:
    """Write rows that NeMo Gym reads."""
    rows = (
        environment.distinct_tasks(known.num_tasks, split=known.split, seed=known.seed)
        if known.distinct
        else islice(environment.tasks(known.split, known.seed), known.num_tasks)
    )
    lines = (json.dumps(gym_row(row, agent=known.agent)) for row in rows)
    if known.output is None:
        for line in lines:
            print(line)
        return 0
    known.output.parent.mkdir(parents=True, exist_ok=True)
    known.output.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{known.num_tasks} rows of {environment.name} in {known.output}")
    return 0


def _serve(environment: Environment, known: argparse.Namespace) -> int:
    """Serve an environment until SIGTERM or Ctrl-C."""
    try:
        from nemotron3.cli.serve import is_loopback
        from nemotron3.server.gym.app import GymSettings, create_gym_app
        from nemotron3.server.http.logs import written_logs
        from nemotron3.server.running import bind, serve
    except ImportError as error:
        raise DependencyMissingError(
            f"the server needs {error.name}, which is not installed: pip install 'nemotron3[serve]'"
        ) from error
    settings = GymSettings(max_sessions=known.max_sessions, session_expiry_s=known.session_expiry)
    server = create_gym_app(environment, settings)
    with written_logs(known.log_format), bind(known.host, known.port) as bound:
        address = f"http://{known.host}:{bound.getsockname()[1]}"
        log = logging.getLogger("nemotron3.server")
        if not is_loopback(known.host):
            log.warning("anyone who reaches %s can use this server: it asks for no key", known.host)
        log.info("%s at difficulty %g: %s", environment.name, environment.difficulty, address)
        serve(server, bound, drain_timeout_s=known.drain_timeout)
    return 0


async def _demonstration(environment: Environment, row: Row, *, with_tools: bool) -> dict[str, Any]:
    """A solved task as a row of conversations, which `nemotron3 sft` reads."""
    response = await environment.demonstration(row)
    messages = [to_dict(message) for message in (*prompt_of(row), *response.messages)]
    # As a rollout's prompt describes them (`tools_of`).
    tools = [
        {name: value for name, value in tool.items() if name != "strict"}
        for tool in (row["responses_create_params"]["tools"] if with_tools else [])
    ]
    return {"messages": messages} | ({"tools": tools} if tools else {})


async def _shown(environment: Environment, row: Row) -> str:
    """A task, its solution and the reward."""
    names = ", ".join(tool.name for tool in tools_of(row))
    lines = ["─" * 72]
    lines += [f"[tools] {names}"] if names else []
    lines += map(_said, prompt_of(row))
    if not environment.has_demonstrations:
        return "\n".join([*lines, "[no demonstration]"])
    response, session = await environment.play(row, environment.solve(row))
    lines += map(_said, response.messages)
    verification = await environment.verify(row, response, session)
    parts = ", ".join(f"{name} {value:g}" for name, value in verification.components.items())
    if verification.failure is not None:
        return "\n".join([*lines, f"[{verification.failure.kind}] {verification.failure.message}"])
    return "\n".join(
        [*lines, f"[reward] {verification.reward:g}" + (f" ({parts})" if parts else "")]
    )


def _said(message: Message) -> str:
    if not isinstance(message, AssistantMessage):
        return f"[{_ROLES.get(type(message), 'user')}] {message.content}"
    lines = [] if message.reasoning is None else [f"[reasoning] {message.reasoning}"]
    for call in message.tool_calls:
        arguments = ", ".join(f"{name}={value!r}" for name, value in call.arguments.items())
        lines.append(f"[call] {call.name}({arguments})")
    lines += [f"[assistant] {message.content}"] if message.content else []
    return "\n".join(lines)


def _page(environment: Environment, report: EnvironmentReport) -> str:
    solved = [
        f"  turns of a solution      {report.num_turns} at most, {environment.max_turns} allowed",
        f"  most common last turn    {report.top_answer_share:.1%}: {report.top_answer[:40]!r}",
        f"  reward of the solutions  {report.demonstration_reward:.3f}",
    ]
    lines = [
        f"{environment.name} at difficulty {environment.difficulty:g}, "
        f"{report.num_tasks} held-out tasks",
        f"  different prompts        {report.num_distinct_prompts}",
        f"  longest prompt           {report.longest_prompt} characters",
        *(solved if environment.has_demonstrations else ["  no demonstrations"]),
        f"  failures                 {report.num_failures}",
        "  reward of",
    ]
    width = max(map(len, report.hack_rewards))
    lines += [f"    {hack:<{width}}  {value:.3f}" for hack, value in report.hack_rewards.items()]
    return "\n".join(lines)
