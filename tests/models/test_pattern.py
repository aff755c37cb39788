"""Layer patterns: what they mean, and what is said of one that means nothing."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron3.errors import ConfigError
from nemotron3.models.mixer import last_stateful_layer
from nemotron3.models.pattern import parse_pattern
from tests.tiny import tiny_config

KINDS = {"M": "mamba", "*": "attention", "E": "experts", "-": "mlp"}


def test_a_pattern_is_layers_and_repeated_prediction_depths():
    pattern = parse_pattern("MEM*-/*E/*E", KINDS)
    assert pattern.main == ("M", "E", "M", "*", "-")
    assert pattern.mtp == ("*", "E")
    assert pattern.num_mtp_depths == 2
    assert pattern.symbols == set(KINDS)


def test_without_a_slash_there_is_no_prediction_block():
    pattern = parse_pattern("M", KINDS)
    assert (pattern.mtp, pattern.num_mtp_depths, pattern.symbols) == ((), 0, {"M"})


@settings(derandomize=True, deadline=None)
@given(
    main=st.text("M*E-", min_size=1),
    mtp=st.text("M*E-", min_size=1),
    depths=st.integers(0, 3),
)
def test_writing_a_parsed_pattern_gives_it_back(main, mtp, depths):
    text = "/".join([main] + [mtp] * depths)
    assert str(parse_pattern(text, KINDS)) == text


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "has no layers"),
        ("/*E", "has no layers"),
        ("ME/*E/*-", r"different layers \('\*E', '\*-'\)"),
        ("ME/", "'/' with nothing after it"),
        ("MEX*", r"'X' at position 2; allowed are M \(mamba\)"),
        ("ME/*Q/*Q", "'Q' at position 4"),
        ("MeM", "did you mean 'E'"),
        ("AM", r"did you mean '\*'"),
        ("ME|M", "leave '|' out".replace("|", r"\|")),
        ("MG", "gated DeltaNet, is not in Nemotron 3"),
    ],
)
def test_an_impossible_pattern_is_refused_and_the_place_is_named(pattern, message):
    with pytest.raises(ConfigError, match=message):
        parse_pattern(pattern, KINDS)


@pytest.mark.parametrize(
    ("main", "last"), [("MEM*E", 3), ("ME-", 0), ("E-", 0), ("*", 0), ("EEM", 2)]
)
def test_the_last_layer_with_a_state(main, last):
    assert last_stateful_layer(tiny_config(main).layers) == last


def test_what_is_allowed_is_what_the_model_has():
    parse_pattern("MG", KINDS | {"G": "gated"})
    with pytest.raises(ConfigError, match=r"'M' at position 1; allowed are G \(gated\)"):
        parse_pattern("GM", {"G": "gated"})
    with pytest.raises(ConfigError, match=r"did you mean 'G'\?"):
        parse_pattern("g", {"G": "gated"})
