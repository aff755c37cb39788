"""Readers of answers: one thing, or nothing."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron3.environments.answers import boxed, choice, number


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{4}", "4"),
        (r"So it is \boxed{ 4 }.", "4"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{}", ""),
        (r"\boxed{4} or \boxed{5}", None),
        (r"\boxed{4} \boxed{4}", None),
        (r"\boxed{4", None),
        ("4", None),
        ("", None),
        (r"\boxed{4}" + " " * 30_000, None),
    ],
)
def test_boxed(text, inside):
    assert boxed(text) == inside


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", Fraction(12)),
        (" -3 ", Fraction(-3)),
        ("+3", Fraction(3)),
        ("1,234", Fraction(1234)),
        ("1,234,567.5", Fraction("1234567.5")),
        ("0.50", Fraction(1, 2)),
        ("6/4", Fraction(3, 2)),
        ("1/0", None),
        ("12,34", None),
        ("1e5", None),
        ("inf", None),
        ("nan", None),
        ("1_000", None),
        ("٣", None),
        ("1 2", None),
        ("9" * 40, None),
        ("", None),
    ],
)
def test_number(text, value):
    assert number(text) == value


@given(st.fractions(max_denominator=10**6), st.integers(-(10**15), 10**15))
def test_numbers_are_read_as_they_are_written(fraction, whole):
    if abs(fraction.numerator) < 10**18:
        assert number(str(fraction)) == fraction
    assert number(str(whole)) == number(f"{whole:,}") == whole


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B)", "B"),
        (r"\boxed{B}", "B"),
        (r"The answer is \boxed{B}.", "B"),
        ("b", None),
        ("E", None),
        ("A B", None),
        ("ABCD", None),
        (r"\boxed{A} \boxed{B}", None),
        (r"\boxed{AB}", None),
        (r"B \boxed{", None),
        ("B 12", None),
        ("", None),
    ],
)
def test_choice(text, letter):
    assert choice(text, "ABCD") == letter


@given(st.text())
def test_any_text_can_be_read(text):
    for read in (boxed, number, lambda said: choice(said, "AB")):
        read(text)
        read("\\boxed{" + text + "}")
