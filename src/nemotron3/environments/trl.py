"""One of our environments in TRL, whose trainer plays the rollouts.

ours = for_trl(load_environment("calculator"), num_tasks=1000)
GRPOTrainer(..., train_dataset=Dataset.from_list(ours.dataset),
            environment_factory=ours.factory, reward_funcs=ours.reward)
"""

import asyncio
import inspect
import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar, cast

from nemotron3.environments.environment import Environment
from nemotron3.environments.response import TaskResponse, to_dict
from nemotron3.environments.rows import Row, Split, prompt_of, tools_of
from nemotron3.environments.tool_classes import JSON_TYPES
from nemotron3.environments.verification import RolloutFailedError
from nemotron3.errors import ConfigError
from nemotron3.text import AssistantMessage, Message, Tool, parse_messages

T = TypeVar("T")

_THINK_START, _THINK_END = "<think>", "</think>"


@dataclass(frozen=True, kw_only=True)
class TRLParts:
    """What TRL's `GRPOTrainer` is given of an environment."""

    dataset: list[dict[str, Any]]
    """Rows for `Dataset.from_list`: `prompt`, and `row`, which is the whole task as JSON."""
    factory: type
    """For `environment_factory`: a class whose methods are the environment's tools."""
    reward: Callable[..., list[float | None]]
    """For `reward_funcs`: None where a judge or tool failed, which TRL leaves out."""


def for_trl(
    environment: Environment, *, num_tasks: int, split: str | Split = Split.TRAIN, seed: int = 0
) -> TRLParts:
    """An environment of ours for TRL; `ConfigError` where its user speaks between turns.

    TRL does not say whether a rollout was cut, so all count as complete.
    """
    if type(environment).step is not Environment.step:
        raise ConfigError(
            f"environment {environment.name} says something after a turn that calls no tool, where "
            "TRL ends a rollout; it cannot be used there"
        )
    rows = [environment.task(index, split=split, seed=seed) for index in range(num_tasks)]
    dataset = [
        {"prompt": [to_dict(message) for message in prompt_of(row)], "row": json.dumps(row)}
        for row in rows
    ]
    tools = {tool.name: tool for row in rows for tool in tools_of(row)}
    methods = {name: _method(tool) for name, tool in tools.items()}
    factory = type(
        f"{environment.name.title()}Rollout", (_Rollout,), {**methods, "_of": environment}
    )

    def reward(
        completions: Sequence[Any], environments: Sequence[Any], **_: Any
    ) -> list[float | None]:
        """The environment's rewards for the rollouts of a batch."""
        pairs = zip(environments, completions, strict=True)
        return [rollout._verified(completion) for rollout, completion in pairs]

    reward.__name__ = environment.name
    return TRLParts(dataset=dataset, factory=factory, reward=reward)


class _Rollout:
    """One rollout of an environment, as TRL drives it; subclasses have the tools."""

    _of: ClassVar[Environment]

    def reset(self, *, row: str, **_: Any) -> None:
        """Begin a rollout of a task."""
        self._row: Row = json.loads(row)
        self._failure: RolloutFailedError | None = None
        self._session = _wait(self._of.seed_session(self._row))

    def _call(self, name: str, arguments: Mapping[str, Any]) -> str:
        given = {name: value for name, value in arguments.items() if value is not None}
        try:
            return _wait(self._of.call_tool(self._session, name, given))
        except RolloutFailedError as error:
            self._failure = error
            raise

    def _verified(self, completion: Any) -> float | None:
        if self._failure is not None:
            return None
        said = (
            [{"role": "assistant", "content": completion}]
            if isinstance(completion, str)
            else completion
        )
        messages = tuple(map(_without_thinking, parse_messages(said)))
        try:
            verdict = _wait(
                self._of.verify(self._row, TaskResponse(messages=messages), self._session)
            )
        except RolloutFailedError:
            return None
        return verdict.reward


def _method(tool: Tool) -> Callable[..., str]:
    """A method that calls a tool, with the signature and docstring that TRL reads."""
    schema: Mapping[str, Any] = tool.parameters or {}
    properties = cast(Mapping[str, Any], schema.get("properties") or {})
    required = cast(Sequence[str], schema.get("required") or ())
    if not all(name.isidentifier() for name in (tool.name, *properties)):
        raise ConfigError(f"tool {tool.name} has a name that no Python method can have")

    def method(self: _Rollout, **arguments: Any) -> str:
        return self._call(tool.name, arguments)

    hints = {name: _hint(each) for name, each in properties.items()}
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
    for name, hint in hints.items():
        default = inspect.Parameter.empty if name in required else None
        parameters.append(inspect.Parameter(name, keyword, default=default, annotation=hint))
    method.__name__ = method.__qualname__ = tool.name
    method.__annotations__ = {**hints, "return": str}
    method.__signature__ = inspect.Signature(parameters, return_annotation=str)  # pyright: ignore[reportFunctionMemberAccess]
    lines = [f"    {name}: {each.get('description') or name}" for name, each in properties.items()]
    head = tool.description or tool.name
    method.__doc__ = "\n".join(
        [head, *(["", "Args:", *lines] if lines else []), "", "Returns:", "    What the tool says."]
    )
    return method


def _hint(schema: Mapping[str, Any]) -> Any:
    """A type hint for a JSON schema; of what it cannot say, the tool itself tells a policy."""
    plain = {name: kind for kind, name in JSON_TYPES.items()}
    kind = schema.get("type")
    if "enum" in schema and all(isinstance(each, str) for each in schema["enum"]):
        return Literal[tuple(schema["enum"])]
    if kind == "array":
        return list[_hint(schema.get("items") or {"type": "string"})]
    return dict if kind == "object" else plain.get(str(kind), str)


def _without_thinking(message: Message) -> Message:
    """A turn with its thinking apart; TRL leaves it in the content."""
    if not isinstance(message, AssistantMessage) or _THINK_END not in message.content:
        return message
    reasoning, _, content = message.content.partition(_THINK_END)
    return replace(message, reasoning=reasoning.removeprefix(_THINK_START), content=content)


def _wait(job: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, also where the caller's thread runs an event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(job)
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(asyncio.run, job).result()
