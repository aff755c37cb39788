"""`nemotron3 show`, and the list of recipes that ends a page of help."""

import json

from nemotron3.config import to_record
from nemotron3.recipes.load import load_recipe, recipes_of
from nemotron3.recipes.run_config import RunConfig


def show(recipe: str) -> int:
    """Print a recipe's whole configuration."""
    print(json.dumps(to_record(load_recipe(recipe)), indent=2))
    return 0


def with_recipes(page: str, kind: type[RunConfig]) -> str:
    """A page of help, followed by the recipes of the verb."""
    recipes = [f"  {name:<12}{what}" for name, what in recipes_of(kind).items()]
    return "\n".join([page, "recipes:", *recipes])
