"""What the reports add to rewards and advantages: shorter answers on request, penalties of form.

* Effort: where the prompt asks for little effort, a right answer earns more the shorter it is, and
  one above the bound loses (Ultra; for Super on 2% of the prompts, later 1%):

      l = min(1, weight (1 - length / bound))
      R <- R + R max(l, 0) + penalty min(l, 0)

* Zeroed rewards (Ultra): an empty answer, an answer that is the reasoning once more, reasoning tags
  that do not match.
* Advantages of single turns (Super): every token of a turn with an invalid call, or with reasoning
  tags that do not match, gets -5, whatever the rollout was worth.
* Overlong rollouts (Nano, and Super's software engineering): what a limit cut off counts in the
  baseline and is not trained on, since it may have been right if it had gone on.

All are off unless they are asked for.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nemotron3.errors import ConfigError
from nemotron3.rl.rollouts import Rollout


@dataclass(frozen=True, kw_only=True)
class EffortShapingConfig:
    """How length counts where little effort is asked for."""

    weight: float = 0.1
    """Most that a right answer earns more, as a share of its reward."""
    bound: int = 15_000
    """Tokens of a rollout from which on length costs."""
    penalty: float = 1.0
    """Factor of what it costs."""

    def __post_init__(self) -> None:
        for name in ("weight", "bound", "penalty"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"is {value}; it must be above 0", field=f"shaping.effort.{name}")

    def shaped(self, reward: float, length: int) -> float:
        """The reward of a rollout of `length` sampled tokens."""
        saved = min(1.0, self.weight * (1 - length / self.bound))
        return reward + reward * max(saved, 0.0) + self.penalty * min(saved, 0.0)


@dataclass(frozen=True, kw_only=True)
class RewardShapingConfig:
    """What is changed after an environment has given its reward."""

    effort: EffortShapingConfig | None = None
    """For prompts that ask for little effort (`rollouts.effort_fraction`)."""
    zero_empty_answers: bool = False
    """Whether a rollout without a final answer has reward 0."""
    zero_repeated_reasoning: bool = False
    """Whether an answer that equals the reasoning before it has reward 0."""
    zero_malformed_reasoning: bool = False
    """Whether reasoning tags that do not match have reward 0."""
    invalid_call_advantage: float | None = None
    """Advantage of turns with a call that no tool takes; -5 for Super, null for the rollout's."""
    malformed_reasoning_advantage: float | None = None
    """Advantage of turns whose reasoning tags do not match; -5 for Super, null likewise."""
    filter_overlong: bool = False
    """Whether rollouts that a limit cut off are left out of the loss."""

    def __post_init__(self) -> None:
        for name in ("invalid_call_advantage", "malformed_reasoning_advantage"):
            value = getattr(self, name)
            if value is not None and not (value <= 0 and math.isfinite(value)):
                raise ConfigError(
                    f"is {value}; a penalty must be 0 or less", field=f"shaping.{name}"
                )


@dataclass(frozen=True, kw_only=True)
class TurnPenalty:
    """A turn whose tokens have an advantage of their own."""

    turn: int
    """Its number among the policy's, from 0."""
    advantage: float
    why: str


def shaped_reward(rollout: Rollout, config: RewardShapingConfig) -> float | None:
    """The reward that advantages are computed from; None where something failed."""
    reward = rollout.reward
    if reward is None:
        return None
    if why_zeroed(rollout, config) is not None:
        return 0.0
    if config.effort is not None and rollout.effort is not None:
        return config.effort.shaped(reward, rollout.num_sampled)
    return reward


def why_zeroed(rollout: Rollout, config: RewardShapingConfig) -> str | None:
    """Why a rollout has reward 0, whatever its environment has given; None where it counts."""
    response = rollout.response
    last = response.turns[-1] if response.turns else None
    if config.zero_empty_answers and not response.answer:
        return "no final answer"
    if (
        config.zero_repeated_reasoning
        and last is not None
        and bool(last.reasoning)
        and (last.reasoning or "").strip() == last.content.strip()
    ):
        return "the answer is the reasoning once more"
    if config.zero_malformed_reasoning and any(turn.is_malformed for turn in rollout.turns):
        return "reasoning tags that do not match"
    return None


def turn_penalties(rollout: Rollout, config: RewardShapingConfig) -> list[TurnPenalty]:
    """The turns of a rollout that are penalized; of several penalties the largest counts."""
    found: list[TurnPenalty] = []
    if config.invalid_call_advantage is None and config.malformed_reasoning_advantage is None:
        return found
    for number, turn in enumerate(rollout.turns):
        penalties = [
            (penalty, why)
            for penalty, applies, why in (
                (config.invalid_call_advantage, turn.has_invalid_call, "a call that no tool takes"),
                (
                    config.malformed_reasoning_advantage,
                    turn.is_malformed,
                    "reasoning tags that do not match",
                ),
            )
            if penalty is not None and applies
        ]
        if penalties:
            largest = min(penalty for penalty, _ in penalties)
            why = " and ".join(why for _, why in penalties)
            found.append(TurnPenalty(turn=number, advantage=largest, why=why))
    return found


def token_advantages(
    rollout: Rollout, advantage: float, config: RewardShapingConfig
) -> Sequence[float]:
    """The advantage of every token of a rollout, prompts included."""
    found = [advantage] * len(rollout.ids)
    for penalty in turn_penalties(rollout, config):
        turn = rollout.turns[penalty.turn]
        found[turn.start : turn.end] = [penalty.advantage] * (turn.end - turn.start)
    return found
