"""Recipes by name or from a file, and a plain answer where there is none."""

import pytest

from nemotron3.errors import ConfigError
from nemotron3.recipes.load import RECIPES, load_recipe, recipes_of
from nemotron3.recipes.pretrain import PretrainRun
from nemotron3.recipes.rl import RLRun
from nemotron3.recipes.sft import SFTRun

OWN = """
from dataclasses import replace
from nemotron3.recipes.pretrain import tiny

def recipe():
    return replace(tiny(), name="mine")
"""


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_by_its_name(name):
    assert load_recipe(name).name == name


def test_every_recipe_is_of_one_kind_and_says_what_it_is_in_a_line():
    found = {kind: recipes_of(kind) for kind in (PretrainRun, SFTRun, RLRun)}
    assert sum(map(len, found.values())) == len(RECIPES)
    assert all(len(line) > 20 for recipes in found.values() for line in recipes.values())
    with pytest.raises(ConfigError, match="tiny-sft is a run of kind 'sft', and a RLRun"):
        load_recipe("tiny-sft", RLRun)


def test_a_recipe_from_a_file(tmp_path):
    (tmp_path / "mine.py").write_text(OWN, encoding="utf-8")
    assert load_recipe(str(tmp_path / "mine.py")).name == "mine"


def test_a_misspelt_name_gets_a_suggestion():
    with pytest.raises(
        ConfigError, match=r"no recipe 'tini' \(did you mean 'tiny'\?\).*tiny-books"
    ):
        load_recipe("tini")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("recipe = 3", "has no function `recipe` that returns a run"),
        ("def recipe():\n    return 3", "has no function `recipe` that returns a run"),
        ("", "has no function `recipe`"),
    ],
)
def test_a_file_without_a_recipe_is_refused(tmp_path, content, message):
    file = tmp_path / "mine.py"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(file))


def test_a_recipe_of_another_kind_is_refused_where_one_kind_is_wanted(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from nemotron3.recipes.run_config import RunConfig\n"
        "def recipe():\n    return RunConfig(kind='walk', name='mine')\n"
    )
    assert load_recipe(str(file)).kind == "walk"
    with pytest.raises(ConfigError, match=r"is a run of kind 'walk', and a PretrainRun is wanted"):
        load_recipe(str(file), PretrainRun)
