"""The arms: the published recipe, the recipe without an ingredient, and changes beyond it.

All arms of a seed have the same initial weights and the same batches in the same order. They differ
in the precision of products alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from nemotron3.checkpoint.retention import RetentionConfig
from nemotron3.models.nvfp4_recipe import NVFP4Config
from nemotron3.models.precision import PrecisionConfig
from nemotron3.recipes.pretrain import PretrainRun
from nemotron3.studies.nvfp4.config import NVFP4Study
from nemotron3.training.schedules import WSD

EVALUATIONS = 6
"""Held-out evaluations of a cell, the one at its end included; fewer of a very short one."""
_LEAST_INTERVAL = 4
"""Updates between them."""


class Arm(StrEnum):
    """What is compared."""

    BASELINE = "baseline"
    RECIPE = "recipe"
    NO_TILES = "without-tiles"
    NO_HADAMARD = "without-hadamard"
    NO_STOCHASTIC = "without-stochastic-rounding"
    NO_TAIL = "without-tail"
    FOUR_OVER_SIX = "four-over-six"
    MS_EDEN = "ms-eden"
    FORWARD_ONLY = "forward-only"
    BACKWARD_ONLY = "backward-only"
    LATE_SWITCH = "late-switch"
    COMBINED = "combined"


ABLATIONS = (Arm.NO_TILES, Arm.NO_HADAMARD, Arm.NO_STOCHASTIC, Arm.NO_TAIL)
"""The recipe without one ingredient each."""
CHANGES = (
    Arm.FOUR_OVER_SIX,
    Arm.MS_EDEN,
    Arm.FORWARD_ONLY,
    Arm.BACKWARD_ONLY,
    Arm.LATE_SWITCH,
    Arm.COMBINED,
)
"""What goes beyond the recipe."""

DESCRIPTIONS: Mapping[Arm, str] = {
    Arm.BASELINE: "no operand is rounded",
    Arm.RECIPE: "the published recipe",
    Arm.NO_TILES: "weights in blocks of 16 along each sum instead of 16 x 16",
    Arm.NO_HADAMARD: "no transform of the operands of wgrad",
    Arm.NO_STOCHASTIC: "gradients rounded to nearest",
    Arm.NO_TAIL: "the last layers in few bits like the others",
    Arm.FOUR_OVER_SIX: "four-over-six scales in the forward pass, weights in blocks of 16",
    Arm.MS_EDEN: "MS-EDEN for both operands of both backward products",
    Arm.FORWARD_ONLY: "only the forward pass is rounded",
    Arm.BACKWARD_ONLY: "only the backward pass is rounded",
    Arm.LATE_SWITCH: "the forward pass in high precision from the decay of the learning rate on",
    Arm.COMBINED: "four-over-six, MS-EDEN and the late switch together",
}


_INGREDIENTS: Mapping[Arm, Mapping[str, Any]] = {
    Arm.RECIPE: {},
    Arm.NO_TILES: {"weights": "1d"},
    Arm.NO_HADAMARD: {"transform": "none"},
    Arm.NO_STOCHASTIC: {"gradients": "nearest"},
    Arm.NO_TAIL: {"high_precision_tail": 0.0},
    Arm.FOUR_OVER_SIX: {"weights": "1d", "scales": "four_over_six"},
    Arm.MS_EDEN: {"gradients": "ms_eden"},
    Arm.FORWARD_ONLY: {"products": ("fprop",)},
    Arm.BACKWARD_ONLY: {"products": ("dgrad", "wgrad")},
}
"""Fields of `NVFP4Config` that differ from the recipe for the whole training."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training of the study."""

    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"seed-{self.seed}-{self.arm}"


def precision_of(arm: Arm, plain: PrecisionConfig, *, decay: int, seed: int) -> PrecisionConfig:
    """The precision of an arm, with the dtype of activations of `plain`.

    `decay` is the number of updates before the learning rate decays, `seed` that of stochastic
    rounding.
    """
    recipe = NVFP4Config(seed=seed)
    match arm:
        case Arm.BASELINE:
            return plain
        case Arm.LATE_SWITCH:
            own = replace(recipe, fprop_steps=decay)
        case Arm.COMBINED:
            better = {**_INGREDIENTS[Arm.FOUR_OVER_SIX], **_INGREDIENTS[Arm.MS_EDEN]}
            own = replace(recipe, fprop_steps=decay, **better)
        case _:
            own = replace(recipe, **_INGREDIENTS[arm])
    return replace(plain, recipe="nvfp4", nvfp4=own)


def run_of(study: NVFP4Study, cell: Cell, *, steps: int) -> PretrainRun:
    """The run of a cell of so many updates, with the warm-up and the decay in proportion."""
    training = study.run.training
    schedule = training.schedule
    assert isinstance(schedule, WSD), "the study's settings were checked"
    share = steps / schedule.total_steps
    schedule = replace(
        schedule,
        total_steps=steps,
        warmup_steps=round(share * schedule.warmup_steps),
        decay_steps=max(1, round(share * schedule.decay_steps)),
    )
    every = max(_LEAST_INTERVAL, -(-steps // EVALUATIONS))
    return replace(
        study.run,
        name="run",
        seed=cell.seed,
        training=replace(
            training,
            steps=steps,
            schedule=schedule,
            precision=precision_of(
                cell.arm,
                training.precision,
                decay=steps - schedule.decay_steps,
                seed=cell.seed,
            ),
            evaluate_every_steps=every,
            measure_every_steps=every,
            checkpoint_every_steps=every,
        ),
        final_evaluation_rows=study.run.evaluation_rows,
        retention=RetentionConfig(keep_last=1),
    )
