"""Which documents are held out: by their text alone, never on both sides, never none."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron3.data.splits import Survey, cut_document, document_key
from nemotron3.errors import ConfigError


def decide(texts, *, held_out_fraction=0.1, max_bytes=None, sample_fraction=1.0):
    survey = Survey()
    for text in texts:
        survey.add(document_key(text), len(text.encode()))
    selection = survey.select(
        held_out_fraction=held_out_fraction, max_bytes=max_bytes, sample_fraction=sample_fraction
    )
    keys = [document_key(text) for text in texts]
    return selection, keys


texts_of_two_or_more = st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=30).filter(
    lambda texts: len(set(texts)) > 1
)


@settings(max_examples=100, deadline=None)
@given(texts=texts_of_two_or_more, fraction=st.sampled_from([1e-6, 0.05, 0.5, 0.999]))
def test_both_sides_have_documents_and_copies_stay_together(texts, fraction):
    selection, keys = decide(texts, held_out_fraction=fraction)
    sides = {}
    for text, key in zip(texts, keys, strict=True):
        assert selection.takes(key)
        assert sides.setdefault(text, selection.holds_out(key)) == selection.holds_out(key)
    assert set(sides.values()) == {True, False}


def test_the_fraction_is_met_and_the_order_does_not_matter():
    texts = [f"document {i}" for i in range(2000)]
    selection, keys = decide(texts)
    held_out = {text for text, key in zip(texts, keys, strict=True) if selection.holds_out(key)}
    assert 150 < len(held_out) < 250
    assert decide(texts[::-1])[0] == selection
    grown, _ = decide(texts + [f"more {i}" for i in range(2000)])
    assert {text for text in texts if grown.holds_out(document_key(text))} == held_out


def test_a_cap_is_an_even_sample_within_the_bytes():
    texts = [f"{i:010}" for i in range(1000)]
    selection, keys = decide(texts, max_bytes=3005)
    taken = [i for i, key in enumerate(keys) if selection.takes(key)]
    assert len(taken) == 300
    assert 400 < np.mean(taken) < 600


def test_the_tokenizer_learns_from_a_share_of_what_is_trained_on():
    texts = [f"{i:010}" for i in range(1000)]
    selection, keys = decide(texts, sample_fraction=0.25)
    sampled = [key for key in keys if selection.samples(key)]
    assert 200 < len(sampled) < 230
    assert not any(selection.holds_out(key) for key in sampled)
    all_of_it, _ = decide(texts, sample_fraction=1.0)
    assert all(all_of_it.samples(key) != all_of_it.holds_out(key) for key in keys)


def test_a_cap_that_leaves_one_document_is_an_error():
    with pytest.raises(ConfigError, match="max_bytes = 12 leaves 1 different documents of 3"):
        decide(["a" * 10, "b" * 10, "c" * 10], max_bytes=12)


def test_one_document_is_cut_at_a_line_end():
    text = "".join(f"line {i}\n" for i in range(100))
    front, end = cut_document(text, held_out_fraction=0.1, max_bytes=None)
    assert front + end == text
    assert front.endswith("\n")
    assert 0.08 < len(end) / len(text) < 0.13
    capped = cut_document(text, held_out_fraction=0.1, max_bytes=200)
    assert text.startswith("".join(capped))
    assert len("".join(capped)) <= 200


@settings(max_examples=100, deadline=None)
@given(text=st.text(min_size=1), fraction=st.floats(0.01, 0.99))
def test_one_document_without_lines_is_cut_between_characters(text, fraction):
    front, end = cut_document(text, held_out_fraction=fraction, max_bytes=None)
    assert front + end == text
