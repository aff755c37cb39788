"""What is changed of rewards and advantages after an environment has judged."""

import pytest

from nemotron3.config import from_record, to_record
from nemotron3.environments.rows import make_row
from nemotron3.environments.verification import Verification
from nemotron3.errors import ConfigError
from nemotron3.rl.advantages import AdvantageConfig
from nemotron3.rl.batches import policy_batches
from nemotron3.rl.groups import collect
from nemotron3.rl.records import RolloutRecord, rollout_record
from nemotron3.rl.reward_shaping import (
    EffortShapingConfig,
    RewardShapingConfig,
    shaped_reward,
    token_advantages,
)
from nemotron3.rl.rollouts import Rollout, SampledTurn
from nemotron3.text import AssistantMessage


def rollout(reward=1.0, *, content="4", reasoning="2 and 2", turns=((2, 5, False, False),), **more):
    """A prompt of two tokens and turns as (start, end, has_invalid_call, is_malformed)."""
    length = turns[-1][1]
    sampled = [any(start <= i < end for start, end, *_ in turns) for i in range(length)]
    return Rollout(
        row=make_row("math", "2+2?"),
        ids=list(range(length)),
        is_sampled=sampled,
        logprobs=[0.0] * length,
        weight_versions=[0] * length,
        turns=[
            SampledTurn(start=start, end=end, has_invalid_call=call, is_malformed=tags)
            for start, end, call, tags in turns
        ],
        messages=[AssistantMessage(content=content, reasoning=reasoning)],
        verification=Verification(reward=reward),
        **({"group": 0} | more),
    )


def test_effort_follows_the_formula_of_the_reports():
    """l = min(1, w (1 - len / ub)); R + R max(l, 0) + penalty min(l, 0), by hand."""
    effort = EffortShapingConfig(weight=0.1, bound=100, penalty=1.0)
    assert effort.shaped(1.0, 0) == pytest.approx(1.1)
    assert effort.shaped(1.0, 50) == pytest.approx(1.05)
    assert effort.shaped(0.0, 50) == 0.0
    assert effort.shaped(1.0, 100) == 1.0
    assert effort.shaped(1.0, 200) == pytest.approx(0.9)
    assert effort.shaped(0.0, 200) == pytest.approx(-0.1)
    config = RewardShapingConfig(effort=effort)
    assert shaped_reward(rollout(effort="low"), config) == pytest.approx(1 + 0.1 * (1 - 3 / 100))
    assert shaped_reward(rollout(), config) == 1.0


SUPER = RewardShapingConfig(invalid_call_advantage=-5, malformed_reasoning_advantage=-4)


@pytest.mark.parametrize(
    ("found", "config", "reward", "said"),
    [
        (rollout(), RewardShapingConfig(zero_empty_answers=True), 1.0, None),
        (
            rollout(content=""),
            RewardShapingConfig(zero_empty_answers=True),
            0.0,
            "reward 0: no final answer",
        ),
        (
            rollout(content="2 and 2"),
            RewardShapingConfig(zero_repeated_reasoning=True),
            0.0,
            "reward 0: the answer is the reasoning once more",
        ),
        (
            rollout(turns=((2, 5, False, True),)),
            RewardShapingConfig(zero_malformed_reasoning=True),
            0.0,
            "reward 0: reasoning tags that do not match",
        ),
        (
            rollout(effort="low"),
            RewardShapingConfig(effort=EffortShapingConfig(weight=0.5, bound=6)),
            1.25,
            "reward 1.25: low effort, 3 tokens",
        ),
        (
            rollout(is_cut=True),
            RewardShapingConfig(filter_overlong=True),
            1.0,
            "left out of the loss: cut off",
        ),
    ],
)
def test_a_record_says_what_shaping_did(found, config, reward, said):
    record = rollout_record(found, when="step 0", advantage=0.5, shaping=config)
    assert (record.reward, record.shaped_reward, record.shaping) == (1.0, reward, said)
    plain = rollout_record(found, when="held-out")
    assert (plain.shaped_reward, plain.shaping, plain.penalties) == (1.0, None, ())
    assert from_record(RolloutRecord, to_record(record)) == record


def test_a_record_has_the_penalties_of_turns_that_were_trained():
    found = rollout(turns=((2, 4, True, False), (5, 6, False, False), (7, 9, True, True)))
    record = rollout_record(found, when="step 0", advantage=0.5, shaping=SUPER)
    assert [(p.turn, p.advantage, p.why) for p in record.penalties] == [
        (0, -5, "a call that no tool takes"),
        (2, -5, "a call that no tool takes and reasoning tags that do not match"),
    ]
    trained = token_advantages(found, 0.5, SUPER)
    assert trained == [0.5, 0.5, -5, -5, 0.5, 0.5, 0.5, -5, -5]
    assert rollout_record(found, when="step 0", shaping=SUPER).penalties == ()
    assert from_record(RolloutRecord, to_record(record)) == record


def test_nothing_is_shaped_unless_it_is_asked_for():
    worst = rollout(content="", turns=((2, 5, True, True),))
    assert shaped_reward(worst, RewardShapingConfig()) == 1.0
    assert token_advantages(worst, 0.5, RewardShapingConfig()) == [0.5] * 5


@pytest.mark.parametrize(
    ("setting", "bad"),
    [
        ("zero_empty_answers", {"content": ""}),
        ("zero_repeated_reasoning", {"content": "four", "reasoning": " four\n"}),
        ("zero_malformed_reasoning", {"turns": ((2, 5, False, True),)}),
    ],
)
def test_rewards_of_bad_form_are_zeroed(setting, bad):
    config = RewardShapingConfig(**{setting: True})
    assert shaped_reward(rollout(), config) == 1.0
    assert shaped_reward(rollout(**bad), config) == 0.0


def test_a_failure_stays_a_failure():
    failed = rollout()
    failed.verification = None
    assert shaped_reward(failed, RewardShapingConfig(zero_empty_answers=True)) is None


def test_penalties_replace_the_advantage_of_their_turn_alone():
    played = rollout(turns=((2, 5, True, False), (7, 9, False, True), (10, 12, False, False)))
    config = RewardShapingConfig(invalid_call_advantage=-5.0, malformed_reasoning_advantage=-3.0)
    given = [0.5, 0.5, -5, -5, -5, 0.5, 0.5, -3, -3, 0.5, 0.5, 0.5]
    assert token_advantages(played, 0.5, config) == given
    (batch,) = policy_batches([played], [0.5], max_tokens=50, shaping=config)
    assert batch.weights.tolist() == given[1:]


def test_overlong_rollouts_count_in_the_baseline_and_are_not_trained_on():
    group = [rollout(1.0), rollout(0.0, is_cut=True), rollout(0.0)]

    class Plan:
        quotas = {"math": 1}  # noqa: RUF012

        def tasks(self, *_, **__):
            return [group[0].row]

    def collected(**settings):
        shaping = RewardShapingConfig(**settings)
        config = AdvantageConfig(deviation="none")
        return collect(Plan(), lambda *_: group, 0, rounds=1, config=config, shaping=shaping)

    every = collected()
    assert every.advantages == [1.0, -0.5, -0.5]
    kept = collected(filter_overlong=True)
    assert kept.trained == [group[0], group[2]]
    assert kept.advantages == [1.0, -0.5]


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: EffortShapingConfig(weight=0.0), "weight is 0"),
        (lambda: EffortShapingConfig(bound=0), "bound is 0"),
        (lambda: RewardShapingConfig(invalid_call_advantage=5.0), "a penalty must be 0 or less"),
    ],
)
def test_settings_are_checked(build, said):
    with pytest.raises(ConfigError, match=said):
        build()
