"""The settings of the study: what is trained, in which order, how often.

The claim is the white paper's (arXiv 2512.20856, section 2.6): training on all environments
simultaneously is more stable, less prone to reward hacking and better than stages one after
another. Every arm begins with the same model and makes the same number of updates of the same
number of rollouts; over a cell, each environment has the same number of rollouts in every arm. Only
the order differs.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from nemotron3.errors import ConfigError
from nemotron3.recipes.rl import RLRun, tiny_rl
from nemotron3.rl.curriculum import CurriculumConfig
from nemotron3.studies.study import check_length

QUICK_ENVIRONMENTS = ("math", "structured_output", "list_operations", "letter_counting")
"""Environments of the quick study: a number, a form, a list and a count."""
QUICK_BUDGET_S = 16 * 60.0
"""Seconds that the cells of the quick study take; timing and pages come on top."""


@dataclass(frozen=True, kw_only=True)
class SimultaneousRL:
    """Everything that decides what the study does."""

    name: str = "simultaneous-rl"
    """The study's folder is runs/studies/NAME; one that was interrupted goes on from there."""
    run: RLRun
    """What is trained in every cell. A cell sets steps, schedule, learning rate, seed, and the
    environments of each batch, and plays every task once (`max_rounds` 1), so that all arms have
    the same number of rollouts."""
    steps: int | None
    """Updates of a cell, a multiple of the number of environments; null for what fits in
    `budget_s`."""
    budget_s: float | None = None
    """Seconds that all cells take together, where `steps` is null."""
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    """Peak learning rates; each has all arms and seeds. Parameters with a rate of their own
    (`lr_scale` other than 1), such as the final norm of `tiny-rl`, keep that of `run`."""
    num_seeds: int = 4
    """Repetitions with other tasks and other sampling."""
    replay: float = 0.2
    """Share of the other environments in every batch of the arm that replays them."""
    curriculum: CurriculumConfig = field(
        default_factory=lambda: CurriculumConfig(pool=128, samples=4)
    )
    """Of the arm with a curriculum."""
    held_out_tasks: int = 100
    """Held-out tasks of each environment, played after every stage."""
    smallest_effect: float = 0.02
    """The smallest difference in mean reward that matters."""

    def __post_init__(self) -> None:
        count = len(self.run.environments)
        if count < 2:
            raise ConfigError(
                f"has {count}; the study compares orders, so it needs 2 or more",
                field="run.environments",
            )
        if self.run.lora is not None:
            raise ConfigError("is set; the study trains whole models", field="run.lora")
        if self.prompts % count:
            raise ConfigError(
                f"is {self.run.training.batch_size}; its {self.prompts} prompts must be a multiple "
                f"of the {count} environments, so that all have the same share",
                field="run.training.batch_size",
            )
        check_length(self.steps, self.budget_s, self.num_seeds)
        if self.steps is not None and (self.steps < count or self.steps % count):
            near = max(1, round(self.steps / count)) * count
            raise ConfigError(
                f"is {self.steps}; every one of the {count} environments has a stage of equal "
                f"length, so it must be a multiple of {count}, such as {near}",
                field="steps",
            )
        rates = self.learning_rates
        if not rates or len({*rates}) < len(rates):
            raise ConfigError(f"is {rates}; name one or more, each once", field="learning_rates")
        if not all(rate > 0 and math.isfinite(rate) for rate in rates):
            raise ConfigError(f"is {rates}; each must be above 0", field="learning_rates")
        if not 0 < self.replay < 1:
            raise ConfigError(f"is {self.replay}; it must be between 0 and 1", field="replay")
        if not self.smallest_effect > 0:
            raise ConfigError(
                f"is {self.smallest_effect}; it must be above 0", field="smallest_effect"
            )
        if self.held_out_tasks < 1:
            raise ConfigError(
                f"is {self.held_out_tasks}; it must be 1 or more", field="held_out_tasks"
            )

    @property
    def prompts(self) -> int:
        """Tasks of an update."""
        return self.run.training.batch_size // self.run.group_size

    @property
    def num_stages(self) -> int:
        """Stages of a staged arm, and evaluations of every arm."""
        return len(self.run.environments)


def full_study(model: str) -> SimultaneousRL:
    """All environments of the tiny model, three learning rates, four seeds: hours on two cores."""
    run = _with_environments(tiny_rl(), model, {each.name for each in tiny_rl().environments})
    return SimultaneousRL(run=run, steps=10 * len(run.environments))


def quick_study(model: str) -> SimultaneousRL:
    """Four environments, one learning rate, three seeds, what fits: under 20 minutes."""
    return SimultaneousRL(
        name="simultaneous-rl-quick",
        run=_with_environments(tiny_rl(), model, {*QUICK_ENVIRONMENTS}),
        steps=None,
        budget_s=QUICK_BUDGET_S,
        learning_rates=(3e-4,),
        num_seeds=3,
        curriculum=CurriculumConfig(pool=64, samples=4),
        held_out_tasks=60,
    )


def _with_environments(run: RLRun, model: str, names: Collection[str]) -> RLRun:
    """A run of a model in these environments, with four prompts of each in a batch."""
    chosen = tuple(each for each in run.environments if each.name in names)
    training = replace(
        run.training,
        batch_size=4 * len(chosen) * run.group_size,
        microbatch_size=4 * run.group_size,
    )
    return replace(run, model=model, environments=chosen, training=training)
