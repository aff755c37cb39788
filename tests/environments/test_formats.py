"""Readers and writers of five formats: they agree, and readers are strict."""

import asyncio
import importlib
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron3.environments import formats
from nemotron3.environments.formats import READERS, WRITERS, FormatError
from nemotron3.environments.json_schema import schema_error
from nemotron3.environments.response import TaskResponse
from nemotron3.environments.structured_output import StructuredOutput, _schema, _value
from nemotron3.errors import ConfigError, DataError, DependencyMissingError

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


YAML_TAGS = ("int", "float", "bool", "null", "str", "timestamp", "binary", "merge", "value", "set")
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
        # What PyYAML's own constructors and scanner raise all kinds of errors for.
        *(f"a: !!{tag} {text}" for tag in YAML_TAGS for text in ("foo", "''", "'-'", "1", "[1]")),
        "a: !x y",
        "a: ! 1",
        "!!map {a: 1}",
        "!!str a: 1",
        "a: !<tag:yaml.org,2002:int> 1",
        "%TAG ! tag:x,2000:\n--- !foo 1",
        "a: " + ":".join(["1"] * 200) + ".5",
        'a: "\\UFFFFFFFF"',
        "a: <<",
        "a: =",
        "a: 0x_",
        "a: " + "9" * 5000,
        "a: 9999-12-31 23:59:59 +99:99",
        "? [a]\n: 1",
        "a: \ud800",
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


ODD = {
    "json": [
        '"a":',
        "{",
        "}",
        "[",
        "]",
        ",",
        "1",
        "-",
        "e999",
        "9" * 400,
        "NaN",
        '"\\ud800"',
        "null",
    ],
    "yaml": [
        *(f"!!{tag} " for tag in YAML_TAGS),
        *(
            "a: ",
            "- ",
            "? ",
            ": ",
            "&x ",
            "*x ",
            "!",
            "|",
            ">",
            "%TAG ! x:",
            "---",
            "...",
            "#",
            "<<",
        ),
        *("0x_", "0b_", "1:", "59", ".5", "-", ".inf", "2001-01-", "T25:61:61", "=", "~", "'", '"'),
        *("\\UFFFFFFFF", "\\x", "[", "]", "{", "}", ",", "\t", "\ud800", "\ufeff", "\x85"),
    ],
    "toml": [
        *("a", "=", "[", "]", "{", "}", ",", ".", '"', "'", '"""', "\\u", "\\UFFFFFFFF", "-", "1"),
        *(
            "1979-",
            "99-99",
            "T25:61:61",
            "Z",
            "inf",
            "nan",
            "e999",
            "0x",
            "_",
            "9" * 400,
            "true",
            "#",
        ),
    ],
    "xml": [
        *("<record>", "</record>", "<a>", "</a>", "<", ">", "/", "&lt;", "&x;", "&#0;", "&#xD800;"),
        *(
            "<!--",
            "-->",
            "<![CDATA[",
            "]]>",
            "<?x",
            "?>",
            " xmlns='y'",
            " xml:a='1'",
            "\0",
            "\ud800",
        ),
    ],
    "csv": ["a", ",", '"', '""', "\r", "\0", ";", "1", "-", "true", "9" * 400, "\ud800", "\u0661"],
}
SCHEMAS = [
    RECORD,
    {"type": "object", "properties": {"a": {"type": "number", "minimum": 1, "maximum": 2.5}}},
    {"properties": {"a": {"enum": [1, "x"]}, "b": {"const": [1]}}, "additionalProperties": True},
    {},
]


@pytest.mark.parametrize("kind", READERS)
@given(data=st.data())
def test_any_text_is_read_or_refused(kind, data):
    """From pieces of its format, so that most of its grammar is met."""
    pieces = st.sampled_from([*ODD[kind], "\n", " ", "b"]) | st.text(max_size=2)
    text = "".join(data.draw(st.lists(pieces, max_size=12)))
    schema = data.draw(st.sampled_from(SCHEMAS))
    schema = {"type": "array", "items": schema} if kind == "csv" else schema
    try:
        value = READERS[kind](text, schema)
    except FormatError:
        return
    schema_error(value, schema)


@pytest.mark.parametrize(("kind", "text"), [(k, t) for k, texts in REFUSED.items() for t in texts])
def test_the_environment_gives_no_reward_for_what_is_refused(kind, text):
    environment = StructuredOutput(formats=(kind,))
    row, response = environment.task(0), TaskResponse.of({"role": "assistant", "content": text})
    assert asyncio.run(environment.verify(row, response, None)).reward == 0


def test_a_row_whose_schema_is_none_is_told():
    environment, response = StructuredOutput(), TaskResponse.of({"role": "assistant"})
    for text, said in (("[]", r"is \[\]; give a JSON object"), ("{", "is not JSON")):
        row = {**environment.task(0), "schema_str": text}
        with pytest.raises(DataError, match=said):
            asyncio.run(environment.verify(row, response, None))


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
