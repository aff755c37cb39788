"""Which documents are held out: by their text alone, never on both sides, never none."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron3.data.splits import Survey, cap_document, cut_document, document_key, select
from nemotron3.errors import ConfigError


def survey_of(texts):
    survey = Survey()
    for text in texts:
        survey.add(document_key(text), len(text.encode()))
    return survey


def decide(texts, *, held_out_fraction=0.1, max_bytes=None, sample_fraction=1.0):
    (selection,) = select(
        [survey_of(texts)],
        max_bytes=[max_bytes],
        held_out_fraction=held_out_fraction,
        sample_fraction=sample_fraction,
    )
    return selection, [document_key(text) for text in texts]


def parts(selection, texts):
    """What is trained on and what is held out."""
    train, held_out = [], []
    for text in texts:
        key = document_key(text)
        if not selection.takes(key):
            continue
        if cut := selection.cut_bytes(key):
            front, end = cut_document(text, cut)
            train.append(front)
            held_out.append(end)
        else:
            (held_out if selection.holds_out(key) else train).append(text)
    return train, held_out


def share(selection, texts):
    train, held_out = (sum(len(t.encode()) for t in side) for side in parts(selection, texts))
    return held_out / (train + held_out)


def prose(size, seed=0):
    """Lines of words, so many bytes, and other ones for each seed."""
    lines = (f"{seed}.{line} to be, or not to be\n" for line in range(size // 20 + 1))
    return "".join(lines)[:size]


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


def test_a_cap_that_leaves_no_document_is_an_error():
    with pytest.raises(ConfigError, match="max_bytes = 5 leaves none of 3 different documents"):
        decide(["a" * 10, "b" * 10, "c" * 10], max_bytes=5)


CORPORA = {
    "a book and a note": [300_000, 480],
    "a book and many notes": [300_000] + [480] * 40,
    "one huge among many": [5_000_000] + [2_000] * 1000,
    "a few of one size": [100_000] * 5,
    "one more than a few": [30_000] * 26,
    "rising": [1000 * n for n in range(1, 30)],
    "two notes": [1500, 1700],
    "many notes": [300] * 3000,
    "one book": [300_000],
    "three books": [900_000, 400_000, 100_000],
}


@pytest.mark.parametrize("sizes", CORPORA.values(), ids=CORPORA)
@pytest.mark.parametrize("fraction", [0.02, 0.05, 0.3])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_share_is_met_in_bytes_and_the_order_does_not_matter(sizes, fraction, seed):
    texts = [prose(size, 1000 * seed + n) for n, size in enumerate(sizes)]
    selection, _ = decide(texts, held_out_fraction=fraction)
    assert share(selection, texts) == pytest.approx(fraction, rel=0.25)
    assert decide(texts[::-1], held_out_fraction=fraction)[0] == selection
    assert len(selection.cuts) <= 1
    assert sum(map(len, texts)) == sum(len(t) for side in parts(selection, texts) for t in side)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4000), min_size=1, max_size=12),
    copies=st.lists(st.integers(0, 11), max_size=4),
    fraction=st.floats(0.01, 0.9),
    cap=st.none() | st.integers(24_000, 40_000),
)
def test_no_document_is_trained_on_that_is_held_out(sizes, copies, fraction, cap):
    texts = [prose(size, seed) for seed, size in enumerate(sizes)]
    texts += [texts[index] for index in copies if index < len(texts)]
    selection, _ = decide(texts, held_out_fraction=fraction, max_bytes=cap)
    train, held_out = parts(selection, texts)
    assert held_out
    assert train
    assert not set(train) & set(held_out)
    for text in set(texts) & set(held_out):
        assert not any(front and text.startswith(front) for front in set(train) - set(texts))


@settings(max_examples=60, deadline=None)
@given(
    members=st.lists(
        st.lists(st.integers(0, 9), min_size=1, max_size=8, unique=True), min_size=2, max_size=4
    ),
    fraction=st.sampled_from([0.05, 0.2, 0.6]),
)
def test_a_document_of_several_sources_is_on_one_side_in_all_of_them(members, fraction):
    """Cut ones at the same place; and every source has text on both sides."""
    texts = [prose(150 + 700 * number, number) for number in range(10)]
    sources = [[texts[number] for number in numbers] for numbers in members]
    selections = select(
        [survey_of(source) for source in sources],
        max_bytes=[None] * len(sources),
        held_out_fraction=fraction,
        sample_fraction=0.5,
    )
    trained, kept = set(), set()
    for selection, source in zip(selections, sources, strict=True):
        train, held_out = parts(selection, source)
        assert train
        assert held_out
        assert any(selection.samples(document_key(text)) for text in source)
        trained.update(train)
        kept.update(held_out)
    assert not trained & kept


def test_a_cut_lies_at_a_line_end_or_between_words_near_the_place():
    text = "".join(f"line {i}\n" for i in range(100))
    front, end = cut_document(text, 90)
    assert front + end == text
    assert front.endswith("\n")
    assert 80 < len(end) < 100
    words = "one two three " * 50
    front, end = cut_document(words, 100)
    assert front + end == words
    assert front.endswith(" ")
    assert 90 <= len(end) <= 110


def test_a_capped_document_ends_with_a_line():
    text = "".join(f"line {i}\n" for i in range(100))
    assert cap_document(text, 10_000) == text
    capped = cap_document(text, 200)
    assert text.startswith(capped)
    assert capped.endswith("\n")
    assert 150 < len(capped) <= 200
    assert cap_document("\u00e9" * 50, 21) == "\u00e9" * 10


@settings(max_examples=100, deadline=None)
@given(text=st.text(min_size=1), fraction=st.floats(0.01, 0.99))
def test_one_document_without_lines_is_cut_between_characters(text, fraction):
    held_out_bytes = round(fraction * len(text.encode()))
    front, end = cut_document(text, held_out_bytes)
    assert front + end == text
