"""The settings of the study: what is trained, for how long, how often.

The reports of Super and Ultra train in NVFP4 with ingredients that each have their reason, and say
that the loss stays within 1% of that in bfloat16. The study takes each ingredient away, and adds
what later papers propose, at the size of the tiny model, where a pair of trainings differs by
rounding alone.
"""

from dataclasses import dataclass, replace

from nemotron3.errors import ConfigError
from nemotron3.recipes.pretrain import PretrainRun
from nemotron3.studies.study import check_length
from nemotron3.training.schedules import WSD

LEAST_STEPS = 8
"""Updates of a cell below which warm-up, plateau and decay have no place."""
QUICK_BUDGET_S = 14 * 60.0
"""Seconds that the cells of the quick study take; timing and pages come on top."""


@dataclass(frozen=True, kw_only=True)
class NVFP4Study:
    """Everything that decides what the study does."""

    name: str = "nvfp4"
    """The study's folder is runs/studies/NAME; one that was interrupted goes on from there."""
    run: PretrainRun
    """What is trained in every cell. A cell sets steps, schedule in proportion, seed, precision and
    intervals; `evaluation_rows` are read for all evaluations, that of the end included."""
    steps: int | None
    """Updates of a cell; null for what fits in `budget_s`."""
    budget_s: float | None = None
    """Seconds that all cells take together, where `steps` is null."""
    num_seeds: int = 8
    """Repetitions with other initial weights, batches and rounding."""
    smallest_effect: float = 0.002
    """The smallest difference in loss that matters, relative to the baseline's loss."""

    def __post_init__(self) -> None:
        check_length(self.steps, self.budget_s, self.num_seeds)
        if self.steps is not None and self.steps < LEAST_STEPS:
            raise ConfigError(
                f"is {self.steps}; warm-up, plateau and decay take {LEAST_STEPS} or more",
                field="steps",
            )
        if not isinstance(self.run.training.schedule, WSD):
            raise ConfigError(
                f"is {self.run.training.schedule.kind!r}; the late switch is at the beginning of "
                "the decay of 'wsd'",
                field="run.training.schedule",
            )
        if self.run.init_from is not None:
            raise ConfigError(
                f"is {self.run.init_from}; seeds differ by their initial weights, so leave it out",
                field="run.init_from",
            )
        if self.run.training.precision.recipe != "plain":
            raise ConfigError(
                f"is {self.run.training.precision.recipe!r}; the arms of the study set it, so give "
                "'plain'",
                field="run.training.precision.recipe",
            )
        if not self.smallest_effect > 0:
            raise ConfigError(
                f"is {self.smallest_effect}; it must be above 0", field="smallest_effect"
            )


def full_study(recipe: PretrainRun) -> NVFP4Study:
    """Eight seeds, half of the recipe's updates: of `tiny`, hours on two cores."""
    run = replace(recipe, evaluation_rows=2 * recipe.evaluation_rows)
    return NVFP4Study(name=_name(recipe), run=run, steps=recipe.training.steps // 2)


def quick_study(recipe: PretrainRun) -> NVFP4Study:
    """Three seeds, and as many updates as fit: under 20 minutes, of `tiny` on two cores."""
    return NVFP4Study(
        name=f"{_name(recipe)}-quick",
        run=recipe,
        steps=None,
        budget_s=QUICK_BUDGET_S,
        num_seeds=3,
    )


def _name(recipe: PretrainRun) -> str:
    return "nvfp4" if recipe.name == "tiny" else f"nvfp4-{recipe.name}"
