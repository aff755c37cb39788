"""Environments whose tools are the methods of a class, as in TRL's `environment_factory`.

    class Counter:
        def reset(self, start: int) -> str | None:          # an observation for the prompt, if any
            self.value = start

        def increment(self, by: int = 1) -> int:            # a tool
            '''Add to the counter.'''
            self.value += by
            return self.value

        def get_reward(self) -> float:
            return float(self.value == 10)

    class Counting(ToolClassEnvironment):
        name = "counting"
        tool_class = Counter

        def draw(self, random):
            return self.row("Bring the counter to 10.", start=random.randint(0, 9))

Each rollout has an object of its own, which `reset` is given the row's fields. What `reset` says is
appended to the prompt, so it must say the same for the same fields.
"""

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from nemotron3.environments.environment import ERROR, Environment
from nemotron3.environments.response import TaskResponse
from nemotron3.environments.rows import Row
from nemotron3.environments.verification import Verification
from nemotron3.errors import ConfigError
from nemotron3.text import Message, Tool, UserMessage

_TYPES: dict[Any, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    list: "array",
    dict: "object",
    type(None): "null",
}
_NO_TOOLS = ("reset", "get_reward")
_OWN_FIELDS = ("responses_create_params", "agent_ref", "difficulty")


class ToolClassEnvironment(Environment):
    """Give `name`, `tool_class` and `draw`; see the module."""

    tool_class: ClassVar[type]
    """Public methods are tools, but for `reset` and `get_reward`, which it must have."""
    max_turns = 8

    def __init__(self, *, difficulty: float = 0.5) -> None:
        """Raises `ConfigError` for a class that cannot be used, with the method that is wrong."""
        super().__init__(difficulty=difficulty)
        kind = getattr(type(self), "tool_class", None)
        if not isinstance(kind, type):
            raise ConfigError(f"{type(self).__name__} has no tool_class; give the class one")
        for name in _NO_TOOLS:
            if not callable(getattr(kind, name, None)):
                raise ConfigError(f"{kind.__name__} has no method {name}; it needs one")
        self.tools = tuple(
            _tool(name, method)
            for name, method in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_") and name not in _NO_TOOLS
        )

    def row(
        self,
        prompt: str | Sequence[Message],
        /,
        *,
        tools: Sequence[Tool] | None = None,
        **fields: Any,
    ) -> Row:
        """A row whose prompt ends with what `reset` says for its fields."""
        _, said = self._made(fields)
        if isinstance(prompt, str):
            return super().row(prompt + (said or ""), tools=tools, **fields)
        observed = [UserMessage(content=said)] if said else []
        return super().row([*prompt, *observed], tools=tools, **fields)

    async def seed_session(self, row: Row) -> Any:
        """An object of the class, reset to the row's fields."""
        return self._made({name: row[name] for name in row if name not in _OWN_FIELDS})[0]

    async def run_tool(self, session: Any, name: str, arguments: Mapping[str, Any]) -> str:
        """What the method returns, as text; the policy is told what it raises."""
        try:
            result = getattr(session, name)(**arguments)
            return str(await result if inspect.isawaitable(result) else result)
        except (ArithmeticError, LookupError, TypeError, ValueError, AssertionError) as error:
            return f"{ERROR}{error or type(error).__name__}"

    async def verify(self, row: Row, response: TaskResponse, session: Any) -> Verification:
        """What `get_reward` says at the end; 0 for a response that was cut off."""
        del row
        reward = session.get_reward()
        reward = float(await reward if inspect.isawaitable(reward) else reward)
        return Verification(
            reward=reward if response.is_complete and response.turns else 0.0,
            components={"task": reward, "complete": float(response.is_complete)},
            info={"answer": response.answer[:40]},
        )

    def _made(self, fields: Mapping[str, Any]) -> tuple[Any, str | None]:
        made = self.tool_class()
        try:
            inspect.signature(made.reset).bind(**fields)
        except TypeError as error:
            raise ConfigError(
                f"{self.tool_class.__name__}.reset does not take the fields of a row of "
                f"{self.name} ({error}); name its arguments after them, or add **fields"
            ) from error
        return made, made.reset(**fields)


def _tool(name: str, method: Callable[..., Any]) -> Tool:
    """A method as a tool: its docstring, and a schema of its annotations."""
    hints = typing.get_type_hints(method)
    properties: dict[str, Any] = {}
    required: list[str] = []
    for argument in list(inspect.signature(method).parameters.values())[1:]:
        where = f"argument {argument.name} of {method.__qualname__}"
        if argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD):
            raise ConfigError(f"{where} stands for many; a tool needs each by its name")
        if argument.name not in hints:
            raise ConfigError(f"{where} has no type; annotate it, for example with int")
        properties[argument.name] = _schema(hints[argument.name], where)
        if argument.default is argument.empty:
            required.append(argument.name)
    return Tool(
        name=name,
        description=inspect.getdoc(method) or "",
        parameters={"type": "object", "properties": properties, "required": required},
    )


def _schema(kind: Any, where: str) -> dict[str, Any]:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin in (typing.Union, types.UnionType):
        parts = [_schema(each, where) for each in arguments]
        if all(set(part) == {"type"} for part in parts):
            return {"type": [part["type"] for part in parts]}
    elif origin is list and arguments:
        return {"type": "array", "items": _schema(arguments[0], where)}
    elif (origin or kind) in _TYPES:
        return {"type": _TYPES[origin or kind]}
    raise ConfigError(
        f"{where} is of type {kind}; a tool's are str, int, float, bool, list, dict, Literal and "
        "unions of them"
    )
