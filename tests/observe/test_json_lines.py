"""Files of JSON lines after a kill in the middle of a write."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron3.observe.json_lines import append_lines, cut_lines, read_lines

RECORDS = st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=8)), max_size=6)


@settings(deadline=None)
@given(before=RECORDS, after=RECORDS, data=st.data())
def test_whatever_was_cut_off_what_is_appended_is_read(tmp_path_factory, before, after, data):
    path = tmp_path_factory.mktemp("lines") / "records.jsonl"
    append_lines(path, before)
    text = path.read_bytes()
    kept = text[: data.draw(st.integers(0, len(text)))]
    path.write_bytes(kept)
    whole = before[: kept.count(b"\n")]
    assert list(read_lines(path)) == whole
    append_lines(path, after)
    assert list(read_lines(path)) == whole + after


@settings(deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.data())
def test_a_moment_that_was_cut_is_whole_when_it_is_written_again(tmp_path_factory, sizes, data):
    """Whichever byte is the last one before a kill, and also if the kill came later."""
    path = tmp_path_factory.mktemp("moments") / "records.jsonl"
    moments = [[{"when": m, "n": n} for n in range(size)] for m, size in enumerate(sizes)]

    def write(number):
        append_lines(path, moments[number], is_stale=lambda kept: kept["when"] == number)

    for number in range(len(moments)):
        write(number)
    again = data.draw(st.integers(0, len(moments) - 1))
    length = sum(len(json.dumps(r)) + 1 for moment in moments[:again] for r in moment)
    text = path.read_bytes()
    path.write_bytes(text[: data.draw(st.integers(length, len(text)))])
    for number in range(again, len(moments)):
        write(number)
    assert list(read_lines(path)) == [record for moment in moments for record in moment]


def test_a_half_line_longer_than_a_block_is_removed(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"a": 1}\n{"b": "' + "x" * 200_000)
    append_lines(path, [{"c": 3}])
    assert list(read_lines(path)) == [{"a": 1}, {"c": 3}]


def test_damage_before_the_end_is_an_error_that_changes_nothing(tmp_path):
    path = tmp_path / "records.jsonl"
    text = '{"a": 1}\n{"a": {"a": 2}\n{"a": 3}\n'
    path.write_text(text)
    with pytest.raises(ValueError, match=r"records\.jsonl, line 2 is damaged .*move it away"):
        cut_lines(path, lambda record: record["a"] == 3)
    with pytest.raises(ValueError, match="line 2 is damaged"):
        list(read_lines(path))
    assert path.read_text() == text
