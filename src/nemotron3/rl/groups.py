"""Groups of rollouts for one update: those whose rewards differ, refilled where they do not.

A group whose rewards are all alike has advantages of 0. If such groups were only dropped, a batch
would shrink as the policy learns, and Adam would turn the small gradient of the last few into steps
of full size. So further tasks take their places, for a bounded number of rounds.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nemotron3.environments.rows import Row
from nemotron3.rl.advantages import AdvantageConfig, group_advantages, has_variance
from nemotron3.rl.reward_shaping import RewardShapingConfig, shaped_reward
from nemotron3.rl.rollouts import Rollout, failure_of
from nemotron3.rl.sampling_plan import TaskPlan

Play = Callable[[Sequence[Row], int], Sequence[Rollout]]
"""Plays tasks in groups; the number says which round of the update this is."""


@dataclass(kw_only=True)
class UpdateRollouts:
    """What one update trains on, and everything that was played for it."""

    trained: list[Rollout] = field(default_factory=list[Rollout])
    advantages: list[float] = field(default_factory=list[float])
    played: list[Rollout] = field(default_factory=list[Rollout])
    seconds: float = 0.0
    """How long the play took, with rewards."""

    def metrics(self) -> dict[str, float]:
        """Rewards and counts, over all and by environment."""
        by_environment: dict[str, list[Rollout]] = {}
        for rollout in self.played:
            by_environment.setdefault(rollout.environment, []).append(rollout)
        metrics = _metrics(self.played, self.trained, "") | {"perf/rollouts_s": self.seconds}
        for name, rollouts in by_environment.items():
            own = [rollout for rollout in self.trained if rollout.environment == name]
            metrics |= _metrics(rollouts, own, f"/{name}")
        return metrics


def collect(
    plan: TaskPlan,
    play: Play,
    step: int,
    *,
    rounds: int,
    config: AdvantageConfig,
    shaping: RewardShapingConfig | None = None,
) -> UpdateRollouts:
    """Play an update's tasks, and refill the groups that teach nothing."""
    shaping = shaping or RewardShapingConfig()
    start, found, missing = time.perf_counter(), UpdateRollouts(), dict(plan.quotas)
    for round_ in range(rounds):
        rollouts = play(plan.tasks(step, round_=round_, missing=missing), round_)
        found.played += rollouts
        for group in _groups(rollouts):
            shaped = [(rollout, shaped_reward(rollout, shaping)) for rollout in group]
            scored = [(rollout, reward) for rollout, reward in shaped if reward is not None]
            rewards = [reward for _, reward in scored]
            if not has_variance(rewards):
                continue
            advantages = group_advantages(rewards, config).tolist()
            for (rollout, _), advantage in zip(scored, advantages, strict=True):
                if not (shaping.filter_overlong and rollout.is_cut):
                    found.trained.append(rollout)
                    found.advantages.append(advantage)
            missing[group[0].environment] -= 1
        missing = {name: count for name, count in missing.items() if count}
        if not missing:
            break
    if not found.trained:  # an update of zero gradient, so that the step has its place
        scored = [rollout for rollout in found.played if rollout.reward is not None][:1]
        found.trained, found.advantages = scored, [0.0] * len(scored)
    found.seconds = time.perf_counter() - start
    return found


def _groups(rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
    groups: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group, []).append(rollout)
    return list(groups.values())


def _metrics(
    played: Sequence[Rollout], trained: Sequence[Rollout], suffix: str
) -> dict[str, float]:
    rewards = [rollout.reward for rollout in played if rollout.reward is not None]
    count = max(len(played), 1)
    return {
        f"reward/mean{suffix}": sum(rewards) / max(len(rewards), 1),
        f"rollouts/played{suffix}": float(len(played)),
        f"rollouts/trained{suffix}": float(len(trained)),
        f"rollouts/failed{suffix}": float(sum(failure_of(r) is not None for r in played)),
        f"rollouts/cut{suffix}": sum(rollout.is_cut for rollout in played) / count,
        f"rollouts/tokens{suffix}": sum(rollout.num_sampled for rollout in played) / count,
    }
