"""Environments by name and by file."""

import pytest

from nemotron3.environments import BUILT_IN, load_environment
from nemotron3.environments.calculator import Calculator
from nemotron3.environments.registry import has_environment
from nemotron3.errors import ConfigError

GOOD = '''
from dataclasses import dataclass

from nemotron3.environments import Environment, Verification

PREFIX = "Say "

@dataclass
class State:
    turns: "int" = 0

class Parrot(Environment):
    """Says again what it is told."""

    name = "parrot"

    def draw(self, random):
        word = str(random.randint(0, 10**6))
        return self.row(PREFIX + word, expected_answer=word)

    async def verify(self, row, response, session):
        return Verification.all_of({"same": response.answer == row["expected_answer"]})
'''


def test_built_in_ones_have_names_and_docs():
    assert load_environment("calculator", difficulty=0.25).difficulty == 0.25
    assert isinstance(load_environment("calculator"), Calculator)
    for name, kind in BUILT_IN.items():
        assert kind.name == name
        assert (kind.__doc__ or "").strip()
    with pytest.raises(TypeError):
        BUILT_IN["mine"] = Calculator


def test_a_file_of_one_s_own(tmp_path):
    file = tmp_path / "parrot.py"
    file.write_text(GOOD, encoding="utf-8")
    environment = load_environment(str(file), difficulty=0.1)
    row = environment.task(3)
    assert row["agent_ref"]["name"] == "parrot"
    assert row["responses_create_params"]["input"][0]["content"].startswith("Say ")
    other = load_environment(str(file))
    assert type(other) is not type(environment)  # each load is its own, nothing is registered
    assert other.task(3)["expected_answer"] == row["expected_answer"]


WRONG = {
    "nothing": ("x = 1", "has 0 classes that extend Environment"),
    "imported": (
        "from nemotron3.environments.calculator import Calculator",
        "has 0 classes that extend Environment",
    ),
    "abstract": (
        "from nemotron3.environments import Environment\nclass Mine(Environment):\n    name = 'm'",
        r"give `draw` and `verify` \(none\); one is wanted; Mine lacks draw and verify",
    ),
    "two": (
        GOOD + "\nclass Second(Parrot):\n    name = 'second'\n",
        r"has 2 classes .* \(Parrot, Second\); one is wanted",
    ),
    "nameless": (GOOD.replace('name = "parrot"', "pass"), "Parrot has no name"),
    "arguments": (
        GOOD + "\n    def __init__(self, path, *, difficulty=0.5):\n        pass\n",
        "cannot be built from a difficulty alone",
    ),
}


def test_a_class_that_takes_no_difficulty_is_given_none(tmp_path):
    file = tmp_path / "mine.py"
    own = "\n    def __init__(self):\n        super().__init__(difficulty=0.5)\n"
    file.write_text(GOOD + own, encoding="utf-8")
    assert load_environment(str(file)).name == "parrot"
    with pytest.raises(ConfigError, match=r"the tasks of Parrot are as difficult .* leave diff"):
        load_environment(str(file), difficulty=0.2)


@pytest.mark.parametrize("source", [GOOD, WRONG["abstract"][0], WRONG["two"][0]])
def test_a_file_of_an_environment_is_told_from_others(tmp_path, source):
    file = tmp_path / "mine.py"
    file.write_text(source, encoding="utf-8")
    assert has_environment(str(file))
    file.write_text(WRONG["imported"][0], encoding="utf-8")
    assert not has_environment(str(file))
    assert not has_environment(str(tmp_path / "none.py"))
    assert not has_environment("math")


@pytest.mark.parametrize(("source", "said"), WRONG.values(), ids=WRONG.keys())
def test_files_without_one_environment_are_refused(tmp_path, source, said):
    file = tmp_path / "mine.py"
    file.write_text(source, encoding="utf-8")
    with pytest.raises(ConfigError, match=said):
        load_environment(str(file))


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match=r"no environment 'maths' \(did you mean 'math'\?\)"):
        load_environment("maths")
    with pytest.raises(ConfigError, match=r"nowhere\.py does not exist"):
        load_environment("nowhere.py")
