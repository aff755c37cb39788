"""Layer patterns: what they mean, and what is said of one that means nothing."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron3.errors import ConfigError
from nemotron3.models.pattern import LayerKind, last_stateful_layer, parse_pattern


def test_a_pattern_is_layers_and_repeated_prediction_depths():
    pattern = parse_pattern("MEM*-/*E/*E")
    kinds = LayerKind
    assert pattern.main == (kinds.MAMBA, kinds.EXPERTS, kinds.MAMBA, kinds.ATTENTION, kinds.MLP)
    assert pattern.mtp == (kinds.ATTENTION, kinds.EXPERTS)
    assert pattern.num_mtp_depths == 2
    assert pattern.kinds == set(kinds)


def test_without_a_slash_there_is_no_prediction_block():
    pattern = parse_pattern("M")
    assert (pattern.mtp, pattern.num_mtp_depths, pattern.kinds) == ((), 0, {LayerKind.MAMBA})


@settings(derandomize=True, deadline=None)
@given(
    main=st.text("M*E-", min_size=1),
    mtp=st.text("M*E-", min_size=1),
    depths=st.integers(0, 3),
)
def test_writing_a_parsed_pattern_gives_it_back(main, mtp, depths):
    text = "/".join([main] + [mtp] * depths)
    assert str(parse_pattern(text)) == text


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
        parse_pattern(pattern)


@pytest.mark.parametrize(
    ("main", "last"), [("MEM*E", 3), ("ME-", 0), ("E-", 0), ("*", 0), ("EEM", 2)]
)
def test_the_last_layer_that_remembers(main, last):
    assert last_stateful_layer(parse_pattern(main).main) == last
