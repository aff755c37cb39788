"""Finding a recipe: by name, or in a Python file of the user's own."""

import runpy
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from nemotron3.errors import ConfigError
from nemotron3.recipes.pretrain import small, tiny, tiny_books
from nemotron3.recipes.rl import RLRun, tiny_rl
from nemotron3.recipes.run_config import RunConfig
from nemotron3.recipes.sft import tiny_sft

RECIPES: Mapping[str, Callable[[], RunConfig]] = MappingProxyType(
    {
        "tiny": tiny,
        "tiny-books": tiny_books,
        "small": small,
        "tiny-sft": tiny_sft,
        "tiny-rl": tiny_rl,
    }
)
"""The recipes that the command line knows by name."""

_BOTH = (
    "`nemotron3 rl` takes a file with either; a class in TRL's style needs a subclass of "
    "ToolClassEnvironment that names it and its dataset (docs/guides/add-an-environment.md)"
)
RunT = TypeVar("RunT", bound=RunConfig)


def recipes_of(kind: type[RunConfig]) -> dict[str, str]:
    """The named recipes of one kind of run, each with a line that says what it is."""
    return {
        name: (recipe.__doc__ or "").splitlines()[0]
        for name, recipe in RECIPES.items()
        if isinstance(recipe(), kind)
    }


def load_recipe(name: str, kind: type[RunT] = RunConfig) -> RunT:
    """The run that a recipe describes; `my.py` stands for the function `recipe` in that file.

    `kind` is the class of the runs that will do. Raises ConfigError for a recipe of another one.
    """
    run = RECIPES[name]() if name in RECIPES else _from_file(name, kind)
    if not isinstance(run, kind):
        raise ConfigError(
            f"recipe {name} is a run of kind {run.kind!r}, and a {kind.__name__} is wanted here; "
            "use the command of its kind"
        )
    return run


def has_recipe(file: str) -> bool:
    """Whether a Python file has a function `recipe`."""
    return callable(runpy.run_path(file).get("recipe"))


def _from_file(name: str, kind: type[RunConfig]) -> RunConfig:
    if not name.endswith(".py"):
        close = get_close_matches(name, RECIPES, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ConfigError(
            f"no recipe {name!r}{hint}; there are {', '.join(RECIPES)}, or name a Python file "
            "with a function `recipe` that returns a run, such as a PretrainRun"
        )
    if not Path(name).is_file():
        raise ConfigError(f"recipe file {name} does not exist")
    recipe = runpy.run_path(name).get("recipe")
    run = recipe() if callable(recipe) else None
    if not isinstance(run, RunConfig):
        raise ConfigError(
            f"{name} has no function `recipe` that returns {_wanted(kind)}"
            + (f", and no class that extends Environment; {_BOTH}" if kind is RLRun else "")
        )
    return run


def _wanted(kind: type[RunConfig]) -> str:
    return (
        "a run, such as a PretrainRun" if kind is RunConfig else f"a run of class {kind.__name__}"
    )
