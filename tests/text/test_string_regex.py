"""Expressions for texts: what JSON schema says of strings, and what a call cannot hold."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron3.errors import DataError
from nemotron3.text.string_regex import FORMATS, string_regexes, without


def matches(regex, text):
    """Whether an expression in Rust's syntax matches the whole text."""
    python = re.sub(r"\\x\{([0-9a-f]+)\}", lambda m: re.escape(chr(int(m[1], 16))), regex)
    return re.fullmatch(python, text) is not None


def fits(schema, text):
    return all(matches(regex, text) for regex in string_regexes(schema))


WORDS = ["</parameter>", "<parameter=a>", "<parameter=ab>", "<parameter=b/>", "<parameter=a.c"]
PIECES = [
    *WORDS,
    "<",
    ">",
    "</",
    "parameter",
    "=",
    "a",
    "b",
    "\n",
    "é",
    "<parameter=",
    "</parameter",
]


@given(text=st.lists(st.sampled_from(PIECES), max_size=6).map("".join))
def test_a_text_without_words_is_just_that(text):
    assert matches(without(WORDS), text) is not any(word in text for word in WORDS)


@pytest.mark.parametrize(
    ("form", "right", "wrong"),
    [
        ("date", ["2024-02-29", "2000-02-29"], ["2023-02-29", "1900-02-29", "2023-04-31"]),
        ("time", ["10:00:00Z", "23:59:59.5+01:30"], ["24:00:00Z", "10:00:00", "10:60:00Z"]),
        ("date-time", ["2024-02-29T10:00:00Z"], ["2024-02-30T10:00:00Z", "2024-02-29 10:00:00Z"]),
        ("duration", ["P3W", "P1Y2M", "PT5M", "P1DT2H"], ["P", "P1DT", "PT", "1D"]),
        ("email", ["a.b@c.de", "a+b@x-y.org"], ["a@b", "@c.de", "a..b@c.de"]),
        ("hostname", ["a", "a-b.c"], ["-a", "a..b", ""]),
        ("ipv4", ["0.10.255.1"], ["256.0.0.1", "1.2.3", "01.2.3.4"]),
        ("ipv6", ["::1", "1::", "::", "1:2:3:4:5:6:7:8", "fe80::a:b"], ["1:2", ":::", "1::2::3"]),
        ("uuid", ["12345678-1234-1234-1234-123456789abc"], ["12345678"]),
        ("uri", ["https://a.b/c?d=e#f", "urn:x"], ["a b", "/x", "http:// x"]),
    ],
)  # fmt: skip
def test_formats(form, right, wrong):
    assert all(fits({"format": form}, text) for text in right)
    assert not any(fits({"format": form}, text) for text in wrong)


def test_every_format_is_tried():
    (mark,) = [m for m in test_formats.pytestmark if m.name == "parametrize"]
    assert {form for form, *_ in mark.args[1]} == set(FORMATS)


@given(
    text=st.text(alphabet="ab1/[]-\\_^$é", max_size=4),
    pattern=st.sampled_from(
        [
            r"a",
            r"^a",
            r"a$",
            r"^a|b$",
            r"^(a|b)$",
            r"[\d/]",
            r"\w\d",
            r"a\\$",
            r"^[^a[]+$",
            r"\u0061",
        ]
    ),
)
def test_patterns_match_anywhere_unless_they_are_anchored(text, pattern):
    assert fits({"pattern": pattern}, text) is bool(re.search(pattern, text, re.ASCII))


@pytest.mark.parametrize("pattern", ["(^a)", "a^b", "a$b", "(a$)|b"])
def test_anchors_that_cannot_be_enforced_are_refused(pattern):
    with pytest.raises(DataError, match="are supported only at the ends"):
        string_regexes({"pattern": pattern})


def test_lengths_and_unknown_formats():
    assert fits({"minLength": 1, "maxLength": 2, "format": "binary"}, "éé")
    assert not fits({"minLength": 1}, "")
    assert not fits({"maxLength": 2.0}, "abc")
    with pytest.raises(DataError, match="give a number of characters"):
        string_regexes({"maxLength": -1})
