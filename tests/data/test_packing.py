"""Rows of whole sequences, and batches that are a function of the step."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron3.data.chat_tokens import TokenizedConversation
from nemotron3.data.packed_loader import PackedLoader, PackedSource
from nemotron3.data.packing import pack_best_fit
from nemotron3.errors import ConfigError, DataError


@given(st.lists(st.integers(1, 20)), st.integers(20, 40))
def test_every_sequence_is_in_one_row_and_rows_hold_theirs(lengths, capacity):
    rows = pack_best_fit(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    sums = [sum(lengths[index] for index in row) for row in rows]
    assert all(0 < total <= capacity for total in sums)
    # No two rows could have been one, but for rows that were begun before the other's parts came.
    assert sum(2 * total <= capacity for total in sums) <= 1


def test_a_sequence_goes_where_it_fits_best():
    assert pack_best_fit([6, 7, 3, 4, 10], 10) == [[0, 3], [1, 2], [4]]


@pytest.mark.parametrize("length", [0, 11])
def test_a_sequence_that_no_row_holds_is_an_error(length):
    with pytest.raises(DataError, match=f"sequence 1 has {length} tokens and a row 10"):
        pack_best_fit([3, length], 10)


def conversation(number, length):
    """One whose ids tell which it is; only its last token is trained."""
    is_target = np.zeros(length + 1, np.bool_)
    is_target[-1] = True
    return TokenizedConversation(np.full(length + 1, number, np.int32), is_target)


def source(first, lengths, weight=1.0):
    chosen = [conversation(first + place, length) for place, length in enumerate(lengths)]
    return PackedSource(conversations=chosen, weight=weight)


def numbers(batch):
    """The conversations of a batch, by their ids."""
    starts = np.cumsum([0, *batch.lengths[:-1]])
    return [int(batch.tokens[start]) for start in starts]


def epoch_of(loader, epochs=1):
    rows = sum(loader.rows_of_epoch(epoch) for epoch in range(epochs))
    return [number for step in range(rows) for number in numbers(loader.batch(step))]


LENGTHS = [3, 9, 1, 7, 4, 4, 12, 2]


def test_an_epoch_has_every_conversation_and_the_next_another_order():
    loader = PackedLoader({"a": source(0, LENGTHS)}, seq_len=12, batch_size=1)
    first, both = epoch_of(loader), epoch_of(loader, epochs=2)
    assert sorted(first) == list(range(8))
    assert Counter(both) == Counter(dict.fromkeys(range(8), 2))
    assert both[8:] != first


@pytest.mark.parametrize(("weight", "times"), [(2.0, {2}), (0.5, {0, 1}), (1.5, {1, 2})])
def test_a_weight_is_how_often_an_epoch_has_each(weight, times):
    sources = {"a": source(0, LENGTHS), "b": source(100, LENGTHS, weight)}
    counts = Counter(epoch_of(PackedLoader(sources, seq_len=12, batch_size=1)))
    assert {counts[number] for number in range(8)} == {1}
    assert {counts[100 + number] for number in range(8)} == times
    assert sum(counts[100 + number] for number in range(8)) == 8 * weight


@pytest.mark.parametrize("weight", [0.01, 0.03, 0.1, 0.5, 0.7, 1.0, 1.3, 2.5])
@pytest.mark.parametrize("beside", [True, False])
def test_a_weight_is_exact_over_epochs_and_every_conversation_comes(weight, beside):
    """30 conversations of weight 0.01 are one in about three epochs, and then another one."""
    count, epochs = 30, 100
    sources = {"b": source(100, [1] * count, weight)}
    if beside:
        sources["a"] = source(0, LENGTHS)
    loader = PackedLoader(sources, seq_len=12, batch_size=1)
    found = Counter(number for number in epoch_of(loader, epochs) if number >= 100)
    scale = 1 if beside else math.ceil(1 / min(1, weight * count))  # no epoch is to be empty
    wanted = round(scale * weight * count * epochs, 6)
    assert wanted <= found.total() < wanted + 1
    times = [found[100 + number] for number in range(count)]
    assert max(times) - min(times) <= 1
    assert min(times) >= 1


def test_microbatches_are_the_batch_and_a_step_needs_no_steps_before():
    sources = {"a": source(0, LENGTHS * 5), "b": source(100, LENGTHS)}
    loader = PackedLoader(sources, seq_len=16, batch_size=6, seed=3)
    whole = loader.batch(5)
    parts = [loader.batch(5, microbatch=part, num_microbatches=3) for part in range(3)]
    assert [n for part in parts for n in numbers(part)] == numbers(whole)
    other = PackedLoader(sources, seq_len=16, batch_size=6, seed=3)
    assert numbers(other.batch(5)) == numbers(whole)
    assert numbers(PackedLoader(sources, seq_len=16, batch_size=6).batch(5)) != numbers(whole)
    assert sum(whole.samples.values()) == len(whole.lengths)
    assert whole.num_targets == len(whole.lengths)
    assert sum(whole.lengths) == len(whole.tokens) == len(whole.targets) == len(whole.loss_mask)


def test_targets_are_the_next_ids_and_the_mask_is_theirs():
    ids = np.array([5, 6, 7, 8], np.int32)
    one = TokenizedConversation(ids, np.array([False, False, True, True]))
    batch = PackedLoader({"a": PackedSource(conversations=[one])}, seq_len=3, batch_size=2).batch(0)
    assert batch.tokens.tolist() == [5, 6, 7] * 2
    assert batch.targets.tolist() == [6, 7, 8] * 2
    assert batch.loss_mask.tolist() == [0, 1, 1] * 2
    assert batch.lengths == (3, 3)


def test_too_long_conversations_are_counted_and_none_left_is_an_error():
    loader = PackedLoader({"a": source(0, LENGTHS)}, seq_len=8, batch_size=1)
    assert loader.num_too_long == {"a": 2}
    assert sorted(epoch_of(loader)) == [0, 2, 3, 4, 5, 7]
    with pytest.raises(DataError, match="source a has 2 conversations, and none fits into 8"):
        PackedLoader({"a": source(0, [9, 12])}, seq_len=8, batch_size=1)
    with pytest.raises(ConfigError, match="batch_size = 0"):
        PackedLoader({"a": source(0, [9])}, seq_len=9, batch_size=0)
