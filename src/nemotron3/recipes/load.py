"""Finding a recipe: by name, or in a Python file of the user's own."""

import runpy
from difflib import get_close_matches
from pathlib import Path

from nemotron3.errors import ConfigError
from nemotron3.recipes.pretrain import RECIPES, PretrainRun


def load_recipe(name: str) -> PretrainRun:
    """The run that a recipe describes; `my.py` stands for the function `recipe` in that file."""
    if name in RECIPES:
        return RECIPES[name]()
    if not name.endswith(".py"):
        close = get_close_matches(name, RECIPES, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ConfigError(
            f"no recipe {name!r}{hint}; there are {', '.join(RECIPES)}, or name a Python file "
            "with a function `recipe` that returns a PretrainRun"
        )
    if not Path(name).is_file():
        raise ConfigError(f"recipe file {name} does not exist")
    recipe = runpy.run_path(name).get("recipe")
    run = recipe() if callable(recipe) else None
    if not isinstance(run, PretrainRun):
        raise ConfigError(f"{name} has no function `recipe` that returns a PretrainRun")
    return run
