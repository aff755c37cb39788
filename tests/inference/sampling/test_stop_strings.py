"""Stop strings and special tokens: what is not shown in one piece is not found in one."""

import pytest

from nemotron3.inference.requests import SamplingParams
from nemotron3.inference.sampling.stop_strings import StopStrings
from tests.inference.texts import tokenizer

WRITTEN = "be\n</think>\nParis </think>."


def read(stop, *, is_chat, text=WRITTEN, **options):
    """The text that is certain in the end, and the string that ended it."""
    params = SamplingParams(stop=stop, **options)
    stops = StopStrings(tokenizer(), params, is_chat=is_chat)
    certain = []
    for token in tokenizer().encode(text):
        certain += stops.push([token])
        if stops.matched is not None:
            break
    certain += stops.finish()
    return tokenizer().decode(certain) + stops.rest, stops.matched


@pytest.mark.parametrize("stop", ["\n\n", "e\n\nP", "<", "think>"])
def test_in_a_chat_nothing_is_found_across_or_inside_a_special_token(stop):
    assert read(stop, is_chat=True) == (WRITTEN, None)


@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize("stop", ["</think>", "e\n</think>", "</think>\nP"])
def test_a_special_token_that_is_spelled_out_is_found(stop, is_kept):
    end = WRITTEN.index(stop) + (len(stop) if is_kept else 0)
    found = read(stop, is_chat=True, include_stop_str_in_output=is_kept)
    assert found == (WRITTEN[:end], stop)


@pytest.mark.parametrize("other", ["think", "/", "<"])
def test_what_one_string_spells_out_lets_no_other_find_a_part_of_it(other):
    assert read(("</think>!", other), is_chat=True) == (WRITTEN, None)


@pytest.mark.parametrize("is_kept", [False, True])
def test_no_part_of_a_character_comes_before_it_is_known(is_kept):
    text = "be 😀😁 or"
    found = read("😁", is_chat=True, text=text, include_stop_str_in_output=is_kept)
    assert found == ("be 😀😁" if is_kept else "be 😀", "😁")


def test_characters_of_a_tag_are_text():
    plain = tokenizer().encode("a </think> b", parse_special=False)
    stops = StopStrings(tokenizer(), SamplingParams(stop="k> b"), is_chat=True)
    assert any(stops.ends_at(token) for token in plain)


def test_in_a_text_special_tokens_are_left_out_and_strings_found_across():
    assert read("\n\n", is_chat=False)[1] == "\n\n"
    assert read("</think>", is_chat=False)[1] is None
