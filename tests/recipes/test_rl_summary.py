"""What a run shows: gains that count, and the signs of a degenerate policy."""

import pytest

from nemotron3.recipes.rl_summary import rl_summary
from nemotron3.rl.records import RolloutRecord


def record(number, reward, *, environment="lookup", answer="17", failure=None, **labels):
    return RolloutRecord(
        when="held-out",
        environment=environment,
        group=number,
        prompt=f"task {number}",
        messages=(
            {"role": "user", "content": f"task {number}"},
            {"role": "assistant", "content": answer, "reasoning_content": "so"},
        ),
        reward=reward,
        components={},
        failure=failure,
        answer=answer,
        labels=labels,
        tokens=3,
        is_cut=False,
    )


def summary(before, after):
    return rl_summary(
        before, after, failures={}, held_out_tasks=len(after), parameters=1, seconds=1.0
    )


def test_a_policy_that_answers_unknown_to_everything_is_seen():
    """Its mean reward may even rise: with 30% unanswerable tasks from .2 to .3."""
    kinds = [("no" if i % 10 < 3 else "yes") for i in range(100)]
    before = [
        record(i, float(i % 5 == 0), answer=str(i), is_answerable=kinds[i]) for i in range(100)
    ]
    after = [
        record(i, float(kinds[i] == "no"), answer="unknown", is_answerable=kinds[i])
        for i in range(100)
    ]
    found = summary(before, after)
    assert found.reward["lookup"] == pytest.approx(0.3)
    assert found.most_common_before["lookup"] == pytest.approx(0.01)
    assert found.most_common["lookup"] == 1.0
    rates = found.by_label["lookup"]
    assert rates["is_answerable: no"][1] == 1.0
    assert rates["is_answerable: yes"][1] == 0.0


def test_gains_are_paired_by_task_and_corrected_over_the_environments():
    """Hand-computed: 12 tasks better, 0 worse has p = 2 / 2^12, twice that for two environments."""
    before = [record(i, 0.0) for i in range(12)] + [
        record(i, 0.0, environment="math") for i in range(4)
    ]
    after = [record(i, 1.0) for i in reversed(range(12))]
    after += [record(i, float(i == 0), environment="math") for i in range(4)]
    found = summary(before, after).gains
    assert found["lookup"].p_value == pytest.approx(2 * 2 / 2**12)
    assert found["lookup"].verdict == "holds"
    assert found["math"].p_value == 1.0
    assert found["math"].verdict == "cannot be told"


def test_what_failed_once_is_in_no_pair():
    before = [record(0, 1.0), record(1, None, failure="the judge is away")]
    after = [record(0, 1.0), record(1, 1.0)]
    assert summary(before, after).gains["lookup"].num_tasks == 1


def test_labels_with_many_values_are_left_out():
    before = [record(i, 1.0, expected_answer=str(i)) for i in range(20)]
    assert summary(before, before).by_label["lookup"] == {}


def test_samples_show_prompt_and_answer():
    (sample,) = summary([record(0, 1.0)], [record(0, 1.0)]).samples
    assert sample == {
        "environment": "lookup",
        "prompt": "task 0",
        "text": "(so)\n[assistant] 17",
    }
