"""Advantages against cases worked by hand and the formulas of the reports."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron3.errors import ConfigError, DataError
from nemotron3.rl.advantages import AdvantageConfig, group_advantages

GROUP = AdvantageConfig(clamp=None)
LEAVE_ONE_OUT = AdvantageConfig(deviation="leave_one_out", clamp=None)
PLAIN = AdvantageConfig(deviation="none", clamp=None)
rewards_of_groups = st.lists(st.floats(-3, 3).map(lambda x: round(x, 3)), min_size=2, max_size=16)


def test_plain_advantages_are_rewards_less_the_mean_of_the_others():
    assert group_advantages([1, 0, 0, 0], PLAIN).tolist() == pytest.approx(
        [1, -1 / 3, -1 / 3, -1 / 3]
    )
    assert group_advantages([2, 1], PLAIN).tolist() == [1, -1]


def test_a_lone_success_counts_fully_by_the_groups_deviation_and_a_quarter_by_the_others():
    """Numbers of NeMo RL's formula for a group of 16, as worked out from its code."""
    rewards = [1.0] + [0.0] * 15
    ours = group_advantages(rewards, GROUP)
    assert ours[0].item() == pytest.approx(1 / math.sqrt(1 / 16 * 15 / 16), rel=1e-4)
    theirs = group_advantages(rewards, LEAVE_ONE_OUT)
    assert theirs[0].item() == 1.0
    assert theirs[1:].tolist() == pytest.approx([-0.2582] * 15, abs=1e-4)
    mirrored = group_advantages([0.0] + [1.0] * 15, LEAVE_ONE_OUT)
    assert mirrored[0].item() == -1.0
    assert mirrored[1:].tolist() == pytest.approx([0.2582] * 15, abs=1e-4)


@given(rewards_of_groups)
def test_the_leave_one_out_deviation_is_that_of_nemo_rl(rewards):
    """sigma_i = sqrt((mean of R_j^2 - b_i^2) n / (n - 1)) over the n others."""
    ours = group_advantages(rewards, LEAVE_ONE_OUT).tolist()
    if max(rewards) == min(rewards):
        assert ours == [0.0] * len(rewards)
        return
    for i, reward in enumerate(rewards):
        others = rewards[:i] + rewards[i + 1 :]
        n, mean = len(others), sum(others) / len(others)
        square = sum(r * r for r in others) / n - mean**2
        deviation = math.sqrt(max(square, 0) * n / (n - 1)) if n > 1 else 0.0
        if max(others) == min(others):
            deviation = 0.0
        expected = (reward - mean) / (deviation + 1e-6) if deviation > 0 else reward - mean
        assert ours[i] == pytest.approx(expected, rel=1e-4, abs=1e-6)


@given(rewards_of_groups, st.floats(-5, 5), st.floats(0.1, 10))
def test_advantages_know_neither_level_nor_scale_of_rewards(rewards, shift, scale):
    moved = [scale * reward + shift for reward in rewards]
    if max(rewards) - min(rewards) < 0.01:
        return
    ours, theirs = group_advantages(rewards, GROUP), group_advantages(moved, GROUP)
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3)
    assert ours.argmax() == torch.tensor(rewards).argmax()


@pytest.mark.parametrize("config", [GROUP, LEAVE_ONE_OUT, PLAIN])
def test_what_cannot_be_compared_has_no_advantage(config):
    assert group_advantages([0.7], config).tolist() == [0.0]
    assert group_advantages([0.1] * 7, config).tolist() == [0.0] * 7
    assert group_advantages([], config).tolist() == []


def test_advantages_are_clamped():
    config = AdvantageConfig(clamp=2.0)
    assert group_advantages([1.0] + [0.0] * 15, config).max().item() == 2.0


def test_rewards_that_are_no_numbers_and_wrong_settings_are_refused():
    with pytest.raises(DataError, match="must be finite"):
        group_advantages([1.0, math.nan], GROUP)
    with pytest.raises(ConfigError, match="deviation is 'all'"):
        AdvantageConfig(deviation="all")
    with pytest.raises(ConfigError, match="clamp is 0"):
        AdvantageConfig(clamp=0.0)
