"""Finding an environment: a built-in one by name, one in a Python file, one of a server."""

import inspect
import runpy
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType

from nemotron3.environments.calculator import Calculator
from nemotron3.environments.calendar_scheduling import CalendarScheduling
from nemotron3.environments.code import Code
from nemotron3.environments.environment import Environment
from nemotron3.environments.guess_number import GuessNumber
from nemotron3.environments.gym_server import environment_at, files_at, is_address
from nemotron3.environments.instruction_following import InstructionFollowing
from nemotron3.environments.letter_counting import LetterCounting
from nemotron3.environments.list_operations import ListOperations
from nemotron3.environments.lookup import Lookup
from nemotron3.environments.math_problems import MathProblems
from nemotron3.environments.multiple_choice import MultipleChoice
from nemotron3.environments.over_refusal import OverRefusal
from nemotron3.environments.prompt_injection import PromptInjection
from nemotron3.environments.reasoning_gym import PREFIX, reasoning_gym
from nemotron3.environments.structured_output import StructuredOutput
from nemotron3.environments.workplace import Workplace
from nemotron3.errors import ConfigError

BUILT_IN: Mapping[str, type[Environment]] = MappingProxyType(
    {
        environment.name: environment
        for environment in (
            MathProblems,
            MultipleChoice,
            InstructionFollowing,
            StructuredOutput,
            Code,
            Calculator,
            Workplace,
            CalendarScheduling,
            Lookup,
            ListOperations,
            LetterCounting,
            OverRefusal,
            PromptInjection,
            GuessNumber,
        )
    }
)
"""The built-in environments by name."""


def load_environment(name: str, *, difficulty: float | None = None) -> Environment:
    """The environment of a name; `my.py` stands for the one that is defined in that file.

    `rows.jsonl@http://host:port` stands for those rows and the server that verifies them
    (`environment_at`). Without a `difficulty` it has its own default. Raises `ConfigError` where
    there is none, or where it cannot be built.
    """
    if is_address(name):
        if difficulty is not None:
            raise ConfigError(
                f"environment {name} takes its tasks from rows, which are as difficult as they "
                "are; leave difficulty out"
            )
        return environment_at(name)
    kind = environment_class(name)
    given = {} if difficulty is None else {"difficulty": difficulty}
    if given and not _takes_difficulty(kind):
        raise ConfigError(
            f"environment {name}: the tasks of {kind.__name__} are as difficult as they are, and "
            f"difficulty is {difficulty}; leave difficulty out"
        )
    try:
        inspect.signature(kind).bind(**given)
    except TypeError as error:
        raise ConfigError(
            f"environment {name}: {kind.__name__} cannot be built from a difficulty alone "
            f"({error}); give its other arguments defaults"
        ) from error
    return kind(**given)


def environment_class(name: str) -> type[Environment]:
    """The class of an environment, by name or in a Python file; `reasoning_gym:TASK` is one."""
    if name.startswith(PREFIX):
        return reasoning_gym(name)
    return BUILT_IN[name] if name in BUILT_IN else _from_file(name)


def environment_files(name: str) -> list[Path]:
    """The files that decide what an environment does, by its name; none for a built-in one."""
    if is_address(name):
        return files_at(name)
    return [Path(name)] if name.endswith(".py") else []


def has_environment(name: str) -> bool:
    """Whether a Python file has a class that extends Environment, be it finished or not."""
    return name.endswith(".py") and Path(name).is_file() and bool(_classes_in(name))


def _takes_difficulty(kind: type[Environment]) -> bool:
    parameters = inspect.signature(kind).parameters.values()
    return any(each.name == "difficulty" or each.kind is each.VAR_KEYWORD for each in parameters)


def _classes_in(name: str) -> list[type[Environment]]:
    """The classes that a file defines, and not those that it imports."""
    module = f"environment_{Path(name).stem}"
    return [
        value
        for value in runpy.run_path(name, run_name=module).values()
        if isinstance(value, type) and issubclass(value, Environment) and value.__module__ == module
    ]


def _from_file(name: str) -> type[Environment]:
    if not name.endswith(".py"):
        close = get_close_matches(name, BUILT_IN, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ConfigError(
            f"no environment {name!r}{hint}; there are {', '.join(BUILT_IN)}, or name a Python "
            "file with a class that extends Environment, or ROWS@URL"
        )
    if not Path(name).is_file():
        raise ConfigError(f"environment file {name} does not exist")
    classes = _classes_in(name)
    found = [each for each in classes if not inspect.isabstract(each)]
    if len(found) != 1:
        names = ", ".join(each.__name__ for each in found) or "none"
        lacking = "".join(
            f"; {each.__name__} lacks {' and '.join(sorted(each.__abstractmethods__))}"
            for each in classes
            if inspect.isabstract(each)
        )
        raise ConfigError(
            f"{name} has {len(found)} classes that extend Environment and give `draw` and "
            f"`verify` ({names}); one is wanted{lacking}"
        )
    if not getattr(found[0], "name", None):
        raise ConfigError(f"{name}: {found[0].__name__} has no name; give the class one: name = ''")
    return found[0]
