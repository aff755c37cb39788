"""The number of drafts: the one with the most tokens per second, from any start."""

import random

import pytest

from nemotron3.inference.model_runner.draft_length import DraftLength


def steps(length, costs, rate, count, *, rows=1, seed=0, first=None):
    """Simulate steps of an engine with an acceptance rate; returns the chosen numbers."""
    draw, chosen, seen = random.Random(seed), [], set()
    for _ in range(count):
        drafts = length.choose(rows)
        accepted = []
        for _ in range(rows):
            stood = 0
            while stood < drafts and draw.random() < rate:
                stood += 1
            accepted.append(stood)
        seconds = costs[drafts] + (0.0 if drafts in seen else (first or {}).get(drafts, 0.0))
        seen.add(drafts)
        length.record(drafts, accepted, seconds)
        chosen.append(drafts)
    return chosen


@pytest.mark.parametrize(
    ("costs", "rate", "best"),
    [
        ((1.0, 1.1, 1.2, 1.3), 0.9, 3),  # steps that cost little more: all
        ((1.0, 2.0, 3.0, 4.0), 0.9, 0),  # a step costs as much more as drafts can gain: none
        ((1.0, 1.2, 2.9, 4.6), 0.9, 1),  # expensive from the second on: one
        ((1.0, 1.1, 1.2, 1.3), 0.02, 0),  # almost no draft is accepted: none
    ],
)
def test_what_brings_most_per_second_is_taken(costs, rate, best):
    chosen = steps(DraftLength(3, adapts=True), costs, rate, 400)
    assert chosen[200:].count(best) > 150
    assert set(chosen[:12]) == {0, 1, 2, 3}  # each was tried before


def test_the_first_step_of_a_kind_does_not_count():
    """It may take a hundred times as long as those after it."""
    costs, first = (1.0, 1.1, 1.2, 1.3), {3: 100.0}
    chosen = steps(DraftLength(3, adapts=True), costs, 0.95, 100, first=first)
    assert chosen[20:].count(3) > 60


def test_a_number_that_is_tried_is_tried_until_a_step_counts():
    """The first step after those of another kind is slow and not measured."""
    length = DraftLength(1, adapts=True)
    before = None
    for _ in range(3000):
        drafts = length.choose(1)
        warm = (1.0, 1.2)[drafts]
        length.record(drafts, [drafts], warm if drafts == before else 9.0)
        before = drafts
    assert [length.choose(1) for _ in range(40)].count(1) >= 36


def test_a_step_that_was_held_up_changes_little():
    length = DraftLength(1, adapts=True)
    steps(length, (1.0, 1.2), 0.95, 40)
    for _ in range(5):
        length.record(1, [1], 1.2)
    length.record(1, [1], 1000.0)
    assert length._seconds[1, 1] < 1.4


def test_after_something_else_a_step_is_a_first_one():
    length = DraftLength(1, adapts=True)
    for seconds in (9.0, 9.0, 1.0):
        length.record(0, [0], seconds)
    length.interrupted()
    length.record(0, [0], 1.4)
    assert length._seconds == {(1, 0): 1.0}


def test_what_was_slow_is_tried_again():
    length = DraftLength(2, adapts=True)
    assert steps(length, (1.0, 3.0, 5.0), 0.9, 100)[-20:].count(0) >= 18
    assert steps(length, (1.0, 1.1, 1.2), 0.9, 2000)[-20:].count(2) >= 18


def test_batches_of_other_sizes_are_other_cases():
    length = DraftLength(1, adapts=True)
    assert steps(length, (1.0, 1.1), 0.9, 50)[-20:].count(1) >= 14  # the others are a trial
    assert steps(length, (1.0, 3.0), 0.9, 50, rows=16)[-20:].count(0) >= 14
    assert length.choose(1) == 1


def test_fixed_numbers_stay():
    assert set(steps(DraftLength(2, adapts=False), (1.0, 9.0, 9.0), 0.0, 50)) == {2}
    assert DraftLength(0, adapts=True).choose(4) == 0


def test_the_yield_follows_what_stands():
    length = DraftLength(2, adapts=True)
    for _ in range(200):
        length.record(2, [1], 1.0)
    assert length.yields[2] == pytest.approx(2, abs=0.01)
    assert length.yields[0] == 1
