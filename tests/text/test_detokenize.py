"""Ids to text one by one: equal to decoding the whole, and never half a character."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron3.text.detokenize import IncrementalDetokenizer
from nemotron3.text.tokenizer import Tokenizer

TEXT = "naïve café — 東京 🙂 naïve café — 東京 🙂"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT], vocab_size=320)


def decoded(tokenizer, pieces, **options):
    detokenizer = IncrementalDetokenizer(tokenizer, **options)
    return [*(detokenizer.push(piece) for piece in pieces), detokenizer.finish()]


@given(ids=st.lists(st.integers(0, 330), max_size=12), data=st.data())
def test_pieces_join_to_the_whole(tokenizer, ids, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=4)))
    bounds = [0, *cuts, len(ids)]
    pieces = [ids[a:b] for a, b in itertools.pairwise(bounds)]
    for skip in (False, True):
        shown = "".join(decoded(tokenizer, pieces, skip_special_tokens=skip))
        assert shown == tokenizer.decode(ids, skip_special_tokens=skip)


@given(text=st.text())
def test_whole_characters_are_never_replaced(tokenizer, text):
    pieces = decoded(tokenizer, [[i] for i in tokenizer.encode(text, parse_special=False)])
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


def test_half_a_character_waits_and_is_marked_at_the_end(tokenizer):
    smile = [32 + byte for byte in "🙂".encode()]
    assert decoded(tokenizer, [[i] for i in smile]) == ["", "", "", "🙂", ""]
    assert decoded(tokenizer, [smile[:3]]) == ["", "\ufffd"]
    assert decoded(tokenizer, [smile[:3], [tokenizer.im_end_id]]) == ["", "\ufffd<|im_end|>", ""]


def test_ids_beyond_the_vocabulary_are_nothing(tokenizer):
    assert tokenizer.token_bytes(10_000) == b""
    assert tokenizer.token_bytes(tokenizer.eos_id) == b"</s>"
