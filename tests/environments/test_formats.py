"""Readers and writers of five formats: they agree, and readers are strict."""

import importlib
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron3.environments import formats
from nemotron3.environments.formats import READERS, WRITERS, FormatError
from nemotron3.environments.json_schema import schema_error
from nemotron3.environments.structured_output import StructuredOutput, _schema, _value
from nemotron3.errors import ConfigError, DependencyMissingError

RECORD = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}}
TABLE = {"type": "array", "items": RECORD}


@pytest.mark.parametrize("kind", READERS)
def test_what_is_written_is_read(kind):
    for seed in range(300):
        random = Random(seed)
        schema = _schema(random, seed % 11 / 10, kind)
        value = _value(random, schema)
        text = WRITERS[kind](value)
        assert READERS[kind](text, schema) == value
        assert schema_error(READERS[kind](text, schema), schema) is None


REFUSED = {
    "json": [
        '{"a": 1, "a": 2}',
        '{"a": NaN}',
        '{"a": Infinity}',
        '{"a": 1} {"a": 1}',
        '```json\n{"a": 1}\n```',
        "{'a': 1}",
        "{a: 1}",
        '{"a": 1',
        "[" * 100_000,
        "",
    ],
    "yaml": [
        "a: 1\na: 2",
        "a: 1\n---\na: 1",
        "a: &x [1]\nb: *x",
        "a: *x",
        "a: !!python/object/apply:os.system ['true']",
        "1: 2",
        "a: [1",
        "[" * 2000,
        "a: 2001-99-99",
        "",
    ],
    "toml": ["a = 1\na = 2", "a = 1\n[a]\nb = 1", "a: 1", "a = ", "a = " + "[" * 5000],
    "xml": [
        "<record><a>1</a><a>2</a></record>",
        "<other><a>1</a></other>",
        "<record a='1'/>",
        "<record>x<a>1</a></record>",
        "<record><a>1</a>x</record>",
        "<record><a><c>1</c></a></record>",
        '<!DOCTYPE r [<!ENTITY e "x">]><record><a>&e;</a></record>',
        "<?xml version='1.0'?><record/>",
        "<record><a>1</a></record><record/>",
        "<record><a>1</record>",
        "",
    ],
    "csv": ["a,a\n1,2", "a,b\n1", "a,b\n1,2,3", '"a,b\n1,2', 'a,b\n"1"x,2', ""],
}


@pytest.mark.parametrize(("kind", "text"), [(k, t) for k, texts in REFUSED.items() for t in texts])
def test_what_is_no_document_is_refused(kind, text):
    with pytest.raises(FormatError):
        READERS[kind](text, TABLE if kind == "csv" else RECORD)


WRONG_TYPES = {
    "json": ['{"a": "1"}', '{"a": true}', '{"a": 1.0}', '{"a": null}', '["a"]'],
    "yaml": ["a: '1'", "a: yes", "a: 1.0", "- a"],
    "toml": ['a = "1"', "a = true", "a = 1.0"],
    "xml": ["<record><a>one</a></record>", "<record><a/></record>", "<record><a>1.0</a></record>"],
    "csv": ["a,b\none,x", "a,b\n,x"],
}


@pytest.mark.parametrize(
    ("kind", "text"), [(k, t) for k, texts in WRONG_TYPES.items() for t in texts]
)
def test_other_types_do_not_fit(kind, text):
    schema = TABLE if kind == "csv" else RECORD
    assert schema_error(READERS[kind](text, schema), schema) is not None


@pytest.mark.parametrize("kind", READERS)
@given(text=st.text(alphabet='{}[]<>/:=,"\n &*!-ab1.', max_size=40))
def test_any_text_is_read_or_refused(kind, text):
    schema = TABLE if kind == "csv" else RECORD
    try:
        value = READERS[kind](text, schema)
    except FormatError:
        return
    schema_error(value, schema)


def test_without_pyyaml_yaml_is_left_out_or_refused(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(formats, "import_module", missing)
    assert StructuredOutput(difficulty=1).formats == ("json", "xml", "toml", "csv")
    with pytest.raises(DependencyMissingError, match=r"pip install 'nemotron3\[environments\]'"):
        READERS["yaml"]("a: 1", RECORD)
    monkeypatch.setattr(formats, "import_module", importlib.import_module)
    assert "yaml" in StructuredOutput(difficulty=1).formats


def test_formats_are_known_ones():
    assert StructuredOutput(difficulty=0).formats == ("json",)
    assert StructuredOutput(formats=("toml",)).task(0)["schema_type"] == "toml"
    with pytest.raises(ConfigError, match="give some of json, yaml"):
        StructuredOutput(formats=("ini",))
    with pytest.raises(ConfigError, match="give some of json, yaml"):
        StructuredOutput(formats=())


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize(
    "piece", ["a", "a ", "a: ", "- ", "? ", "[", "{", '"', "<a>", ",", "\n", "a\n"]
)
def test_long_texts_do_not_make_a_reader_hang(kind, piece):
    text = piece * (20_000 // len(piece))
    schema = TABLE if kind == "csv" else RECORD
    try:
        value = READERS[kind](text, schema)
    except FormatError:
        return
    assert not value or schema_error(value, schema)
