"""A recipe is its record: nothing is lost, nothing is forgiven, nothing changes unseen."""

import json
from pathlib import Path

import pytest

from nemotron3.config import from_record, read_run, to_record, write_run
from nemotron3.errors import ConfigError
from nemotron3.recipes.load import RECIPES
from tests import golden

REGENERATE = "if this is intended: python -m tests.golden, and read the difference"
every_recipe = pytest.mark.parametrize("name", RECIPES)


def paths_of(record, path=()):
    """The path of every key, down to the leaves."""
    entries = record.items() if isinstance(record, dict) else enumerate(record)
    for key, value in entries:
        if isinstance(key, str):
            yield (*path, key)
        if isinstance(value, dict | list):
            yield from paths_of(value, (*path, key))


def changed(record, path, change):
    """A copy of the record whose object at `path[:-1]` went through `change(object, key)`."""
    copy = json.loads(json.dumps(record))
    at = copy
    for key in path[:-1]:
        at = at[key]
    change(at, path[-1])
    return copy


def misspell(at, key):
    at[key + "x"] = at.pop(key)


def are_free(path):
    """Whether the keys of this object are names that the user chose."""
    return "weights" in path[:-1]


@every_recipe
def test_a_recipe_survives_its_record(name, tmp_path):
    run = RECIPES[name]()
    assert run.name == name
    through_json = json.loads(json.dumps(to_record(run), allow_nan=False))
    assert from_record(type(run), through_json) == run
    write_run(tmp_path, run)
    assert read_run(tmp_path, type(run)) == run


@every_recipe
def test_every_misspelt_name_is_an_error_that_says_where(name):
    run = RECIPES[name]()
    record = to_record(run)
    paths = [path for path in paths_of(record) if not are_free(path)]
    assert len(paths) > 50
    for path in paths:
        with pytest.raises(ConfigError) as caught:
            from_record(type(run), changed(record, path, misspell))
        assert path[-1] in str(caught.value), path


@every_recipe
def test_every_missing_name_is_an_error_that_says_where(name):
    run = RECIPES[name]()
    record = to_record(run)
    for path in paths_of(record):
        if are_free(path):
            continue
        with pytest.raises(ConfigError) as caught:
            from_record(type(run), changed(record, path, lambda at, key: at.pop(key)))
        assert path[-1] in str(caught.value), path


@pytest.mark.parametrize("name", golden.golden_records())
def test_nothing_changes_unseen(name):
    """Each recipe in full, and the names and shapes that checkpoints depend on."""
    assert golden.golden_records()[name] == golden.read(name), REGENERATE


def test_no_golden_file_is_left_over():
    files = {file.name for file in Path(golden.FOLDER).glob("*.json")}
    assert files == golden.golden_records().keys()
