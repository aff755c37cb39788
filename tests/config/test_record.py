import enum
import json
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron3.config.record import from_record, to_record
from nemotron3.config.units import Duration, Steps, Tokens
from nemotron3.errors import ConfigError


class Balance(enum.Enum):
    AUXILIARY = "auxiliary"
    BIAS = "bias"


@dataclass(frozen=True, kw_only=True)
class Warm:
    kind: Literal["warm"] = "warm"
    warmup_steps: int


@dataclass(frozen=True, kw_only=True)
class Flat:
    kind: Literal["flat"] = "flat"
    rate: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Child:
    width: int
    is_tied: bool
    limits: tuple[float, float] = (0.0, math.inf)

    def __post_init__(self):
        if self.width % 2:
            raise ConfigError(f"width is {self.width}; it must be even")


@dataclass(frozen=True, kw_only=True)
class Parent:
    name: str
    child: Child
    schedule: Warm | Flat
    folder: Path | None
    every: Duration
    budget: Tokens
    balance: Balance
    decay: Literal["linear", "cosine"]
    sizes: tuple[int, ...]
    weights: dict[str, float]
    children: tuple[Child, ...]
    backend: Literal["auto"] | int
    extra: Child | None = None


numbers = st.floats(allow_nan=False)
children = st.builds(
    Child,
    width=st.integers().map(lambda n: 2 * n),
    is_tied=st.booleans(),
    limits=st.tuples(numbers, numbers),
)
parents = st.builds(
    Parent,
    name=st.text(),
    child=children,
    schedule=st.builds(Warm, warmup_steps=st.integers()) | st.builds(Flat, rate=numbers),
    folder=st.none() | st.sampled_from([Path("runs"), Path("runs/tiny")]),
    every=st.builds(Steps, st.integers(0)) | st.builds(Tokens, st.integers(0)),
    budget=st.builds(Tokens, st.integers(0)),
    balance=st.sampled_from(Balance),
    decay=st.sampled_from(["linear", "cosine"]),
    sizes=st.lists(st.integers()).map(tuple),
    weights=st.dictionaries(st.text(), numbers),
    children=st.lists(children, max_size=2).map(tuple),
    backend=st.just("auto") | st.integers(),
    extra=st.none() | children,
)


@settings(deadline=None)
@given(parents)
def test_a_configuration_survives_json_exactly(parent):
    text = json.dumps(to_record(parent), allow_nan=False)
    assert from_record(Parent, json.loads(text)) == parent


def example() -> dict:
    child = {"width": 4, "is_tied": True, "limits": [0.0, "inf"]}
    return {
        "name": "tiny",
        "child": child,
        "schedule": {"kind": "warm", "warmup_steps": 10},
        "folder": None,
        "every": "10 steps",
        "budget": "1.5M tokens",
        "balance": "bias",
        "decay": "linear",
        "sizes": [1, 2],
        "weights": {"code": 0.5},
        "children": [child],
        "backend": "auto",
        "extra": None,
    }


def test_the_example_is_valid():
    parent = from_record(Parent, example())
    assert parent.child.limits == (0.0, math.inf)
    assert parent.budget == Tokens(1_500_000)
    assert to_record(parent)["child"]["limits"] == [0.0, "inf"]


def put(record: dict, path: str, value: object) -> None:
    *parts, last = path.split(".")
    for part in parts:
        record = record[part]
    record[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("child.widht", 4, r"child\.widht is 4, but Child has no such field.*'width'"),
        ("zzz", 1, r"zzz is 1, but Parent has no such field; it has name, child"),
        ("child.width", "4", r"child\.width is '4' of type str; it must be int"),
        ("child.width", 4.0, r"child\.width is 4\.0 of type float; it must be int"),
        ("child.width", True, r"child\.width is True of type bool; it must be int"),
        ("child.width", 3, r"child: width is 3; it must be even"),
        ("child.is_tied", 1, r"child\.is_tied is 1 of type int; it must be bool"),
        ("child.limits", [1.0], r"child\.limits is \[1\.0\].*an array of 2 items"),
        ("child", 7, r"child is 7 of type int; it must be a JSON object for Child"),
        ("child.limits", ["low", 1.0], r"child\.limits\[0\] is 'low'"),
        ("schedule.kind", "wram", r"schedule\.kind is 'wram'; it must be one of.*'warm'\?"),
        ("schedule", {"warmup_steps": 1}, r"schedule\.kind is missing.*\['flat', 'warm'\]"),
        ("schedule", {"kind": "flat", "warmup_steps": 1}, r"schedule\.warmup_steps is 1, but Flat"),
        ("schedule", "warm", r"schedule is 'warm'.*it must be Warm or Flat"),
        ("balance", "bais", r"balance is 'bais'; it must be one of.*did you mean 'bias'"),
        ("decay", "expo", r"decay is 'expo'; it must be one of 'linear', 'cosine'"),
        ("every", "10 parsecs", r"every is '10 parsecs'"),
        ("budget", "5 steps", r"budget: duration '5 steps' is in steps"),
        ("budget", 5, r"budget is 5 of type int; it must be a string for Tokens"),
        ("sizes", [1, "2"], r"sizes\[1\] is '2'"),
        ("weights", {"code": None}, r"weights\.code is None"),
        ("extra", {"width": 4}, r"extra\.is_tied is missing"),
        ("folder", 3, r"folder is 3 of type int; it must be a string for Path"),
        ("backend", 1.5, r"backend is 1\.5 of type float"),
        ("name", None, r"name is None of type NoneType; it must be str"),
    ],
)
def test_a_wrong_record_names_path_value_and_remedy(path, value, message):
    record = example()
    put(record, path, value)
    with pytest.raises(ConfigError, match=message):
        from_record(Parent, record)


def test_every_missing_key_is_named():
    for key in example():
        record = example()
        del record[key]
        with pytest.raises(ConfigError, match=rf"{key} is missing; Parent needs it"):
            from_record(Parent, record)


def test_a_prefix_leads_the_path():
    with pytest.raises(ConfigError, match=r"config\.name is missing"):
        from_record(Parent, {}, path="config")


def test_members_that_json_cannot_tell_apart_are_refused():
    @dataclass(frozen=True, kw_only=True)
    class Ambiguous:
        source: Path | str

    with pytest.raises(ConfigError, match="source: JSON cannot tell"):
        from_record(Ambiguous, {"source": "a"})


def test_values_without_a_json_form_are_refused():
    with pytest.raises(ConfigError, match="has no place in a record"):
        to_record({"generator": object()})


@dataclass(frozen=True, kw_only=True)
class _NamedLikeAnArgument:
    path: str
    make: str


def test_fields_may_be_called_like_the_decoder_s_own_arguments():
    config = _NamedLikeAnArgument(path="a", make="b")
    assert from_record(_NamedLikeAnArgument, to_record(config)) == config


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"rate": "fast"}, "run.flat.rate"),
        ({"rate": 0.5, "rat": 1}, "run.flat.rat"),
        ({}, "run.flat.rate"),
        ({"kind": "flatt", "rate": 0.5}, "run.flat.kind"),
        ({"rate": 2.0}, "run.flat.rate"),
    ],
)
def test_an_error_carries_the_name_of_its_field(change, field):
    @dataclass(frozen=True, kw_only=True)
    class Bounded(Flat):
        def __post_init__(self):
            if self.rate > 1:
                raise ConfigError(f"is {self.rate}; it must be at most 1", field="rate")

    @dataclass(frozen=True, kw_only=True)
    class Holder:
        flat: Bounded

    with pytest.raises(ConfigError) as caught:
        from_record(Holder, {"flat": {"kind": "flat"} | change}, path="run")
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field} is ")


def test_an_error_about_no_single_value_has_no_field():
    assert ConfigError("two things do not go together").field is None
    copied = pickle.loads(pickle.dumps(ConfigError("is 0", field="lr")))
    assert (str(copied), copied.field, copied.problem) == ("lr is 0", "lr", "is 0")
