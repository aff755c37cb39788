'''Environments in TRL's style: a class whose public methods are the tools of one rollout.

    class Counter:
        def reset(self, **columns) -> str | None: ...        # begins a rollout
        def add(self, number: int) -> str:
            """Add a number.

            Args:
                number: What to add.
            """
        def get_reward(self) -> float: ...                    # or a reward function

Such a class is trained on by naming it and its rows, in a file that `nemotron3 rl my_env.py` takes:

    class CounterEnvironment(ToolClassEnvironment):
        name = "counter"
        factory = Counter
        dataset = [{"prompt": "Count to 3.", "wanted": 3}, ...]
'''

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import (
    Any,
    ClassVar,
    Literal,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from nemotron3.environments.environment import ERROR, Environment
from nemotron3.environments.response import TaskResponse, to_dict
from nemotron3.environments.rows import Row, field_of, prompt_of
from nemotron3.environments.verification import FailureKind, RolloutFailedError, Verification
from nemotron3.errors import ConfigError, DataError
from nemotron3.text import Message, Tool, UserMessage, parse_messages

_NOT_TOOLS = frozenset({"reset", "get_reward", "close"})
JSON_TYPES: Mapping[Any, str] = types.MappingProxyType(
    {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
)


class ToolClassEnvironment(Environment):
    """Tasks of a `dataset`, each played with an object that `factory` makes.

    Rows of the dataset have a `prompt` (a text or messages), and columns that `reset` and the
    reward function are given. What `reset` returns is added to the last message of the user, so it
    must follow from the columns. A tool that raises is answered with the error.
    """

    factory: ClassVar[Any]
    """A class in TRL's style, or a function that makes an object of one."""
    dataset: ClassVar[Sequence[Mapping[str, Any]]]
    """The tasks."""
    reward_function: ClassVar[Callable[..., Sequence[float | None]] | None] = None
    """TRL's reward function, given lists of one: `prompts`, `completions`, `environments`, and the
    columns. Without it the object's `get_reward` gives the reward."""
    max_turns = 16

    def __init__(self) -> None:
        """Raises `ConfigError` for a class that gives no reward, or whose tools say too little."""
        super().__init__()
        for field, what in (
            ("factory", "a class in TRL's style, or a function that makes an object of one"),
            ("dataset", "a sequence of rows with a prompt and the columns of `reset`"),
        ):
            if getattr(self, field, None) is None:
                raise ConfigError(
                    f"environment {self.name}: {type(self).__name__} has no `{field}`; give the "
                    f"class one: {what}"
                )
        if not callable(type(self).factory):
            raise ConfigError(
                f"environment {self.name}: `factory` is {type(self).factory!r}; give a class or a "
                "function, without calling it"
            )
        self._check_dataset()
        example = self._make()
        if not callable(getattr(example, "reset", None)):
            raise ConfigError(
                f"{type(example).__name__} has no method `reset`; it begins a rollout"
            )
        if type(self).reward_function is None and not hasattr(example, "get_reward"):
            raise ConfigError(
                f"{type(example).__name__} has no method `get_reward`; give it one, or give "
                f"{type(self).__name__} a `reward_function`"
            )
        self.tools = tools_of_object(example)

    def _check_dataset(self) -> None:
        if not (hasattr(self.dataset, "__len__") and hasattr(self.dataset, "__getitem__")):
            raise ConfigError(
                f"environment {self.name}: `dataset` is a {type(self.dataset).__name__}; give a "
                "list of rows"
            )
        if not len(self.dataset):
            raise ConfigError(f"environment {self.name}: `dataset` has no rows; give it some")
        first: Any = self.dataset[0]
        if not isinstance(first, Mapping) or "prompt" not in first:
            raise ConfigError(
                f"environment {self.name}: the first row of `dataset` is {first!r:.80}; give each "
                "a `prompt`, as in {'prompt': 'Count to 3.', 'wanted': 3}"
            )

    def draw(self, random: Random) -> Row:
        """Any row of the dataset."""
        columns = dict(random.choice(self.dataset))
        prompt = columns.pop("prompt", None)
        messages: list[Message] = (
            [UserMessage(content=prompt)] if isinstance(prompt, str) else [*parse_messages(prompt)]
        )
        said = self._reset(self._make(), columns)
        if said:
            last = max(
                (i for i, each in enumerate(messages) if isinstance(each, UserMessage)),
                default=None,
            )
            if last is None:
                raise DataError(f"{self.name}: a prompt has no message of the user for `reset`")
            messages[last] = UserMessage(content=messages[last].content + said)
        return self.row(messages, columns=columns, observation=said)

    async def seed_session(self, row: Row) -> Any:
        """An object of the rollout; `DataError` where `reset` says something else than before."""
        columns = field_of(row, "columns", dict)
        state = self._make()
        said = self._reset(state, columns)
        if said != row.get("observation"):
            raise DataError(
                f"{self.name}: `reset` returned {said!r} and before {row.get('observation')!r}; "
                "let it follow from the columns, such as a seed"
            )
        return state

    async def run_tool(self, session: Any, name: str, arguments: Mapping[str, Any]) -> str:
        """Call a method of the rollout's object."""
        try:
            found = getattr(session, name)(**arguments)
            return str(await found if inspect.isawaitable(found) else found)
        except RolloutFailedError:
            raise
        except Exception as error:  # noqa: BLE001 - it is for the policy to read, as in TRL
            return f"{ERROR}{error}"

    async def verify(self, row: Row, response: TaskResponse, session: Any) -> Verification:
        """The reward that the class or its reward function gives; None is a failure."""
        function = type(self).reward_function
        if function is None:
            reward = session.get_reward()
        else:
            columns = {name: [value] for name, value in field_of(row, "columns", dict).items()}
            reward = function(
                prompts=[[to_dict(message) for message in prompt_of(row)]],
                completions=[[to_dict(message) for message in response.messages]],
                environments=[session],
                **columns,
            )[0]
        if reward is None:
            return Verification.failed(FailureKind.JUDGE, f"{self.name} gave no reward")
        return Verification(reward=float(reward))

    def _make(self) -> Any:
        return type(self).factory()

    def _reset(self, state: Any, columns: Mapping[str, Any]) -> str | None:
        said = state.reset(**columns)
        if said is not None and not isinstance(said, str):
            raise DataError(
                f"{self.name}: `reset` returned {type(said).__name__}; return a text or None"
            )
        return said


def tools_of_object(example: Any) -> tuple[Tool, ...]:
    """The public methods of an object as tools, from their type hints and docstrings."""
    methods = inspect.getmembers(example, inspect.ismethod)
    return tuple(
        tool_of_function(method)
        for name, method in methods
        if not name.startswith("_") and name not in _NOT_TOOLS
    )


def tool_of_function(function: Callable[..., Any]) -> Tool:
    """A function as a tool; `ConfigError` without a docstring or type hints that say enough.

    The docstring is Google's: a description, and under `Args:` a line for each parameter.
    """
    name = function.__name__
    description, arguments = _read_docstring(function)
    hints = get_type_hints(function)
    properties: dict[str, Any] = {}
    required: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ConfigError(f"tool {name} takes any arguments; name each with its type")
        if parameter.name not in hints:
            raise ConfigError(f"tool {name}: {parameter.name} has no type hint; give it one")
        schema = _schema(hints[parameter.name], f"tool {name}: {parameter.name}")
        if parameter.name in arguments:
            schema["description"] = arguments[parameter.name]
        properties[parameter.name] = schema
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters = {"type": "object", "properties": properties, "required": required}
    return Tool(name=name, description=description, parameters=parameters)


def _read_docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    text = inspect.getdoc(function)
    if not text:
        raise ConfigError(
            f"tool {function.__name__} has no docstring; the policy reads it to know what it does"
        )
    head, _, rest = text.partition("\nArgs:\n")
    described: dict[str, str] = {}
    last = None
    for line in rest.splitlines():
        if line and not line.startswith(" "):
            break  # the next section
        before, colon, after = line.strip().partition(":")
        name = before.partition("(")[0].strip()
        if colon and name.isidentifier():
            described[name], last = after.strip(), name
        elif last and line.strip():
            described[last] += f" {line.strip()}"
    return head.split("\n\nReturns:\n")[0].strip(), described


def _schema(hint: Any, where: str) -> dict[str, Any]:
    origin, inner = get_origin(hint), get_args(hint)
    if hint in JSON_TYPES:
        return {"type": JSON_TYPES[hint]}
    if origin is Literal:
        return {"enum": list(inner)}
    if origin in (Union, types.UnionType):
        kinds = [_schema(each, where).get("type") for each in inner]
        if all(isinstance(kind, str) for kind in kinds):
            return {"type": kinds}
    if hint is list or origin is list:
        return {"type": "array", **({"items": _schema(inner[0], where)} if inner else {})}
    if hint is dict or origin is dict:
        return {"type": "object"}
    raise ConfigError(
        f"{where} is of type {hint}; tools take str, int, float, bool, None, list, dict, Literal "
        "and unions of plain types"
    )
