"""The arms: which environments each batch of a cell has.

An arm is a chain of `rl` runs, each of which starts from the result of the one before. Trained at
once there is one run; in stages there is one for each environment, each with its own optimizer and
schedule, as separate stages of training have them. Every run warms up over a sixteenth of its
updates and decays over the rest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from nemotron3.checkpoint.retention import RetentionConfig
from nemotron3.recipes.rl import RLRun
from nemotron3.rl.curriculum import CurriculumConfig
from nemotron3.rl.sampling_plan import quotas
from nemotron3.studies.simultaneous_rl.config import SimultaneousRL
from nemotron3.training.schedules import WSD

_TRACE = 1e-6
"""A weight above 0 that adds nothing to the one prompt which every environment of a batch has."""


class Arm(StrEnum):
    """What is compared."""

    SIMULTANEOUS = "simultaneous"
    CURRICULUM = "simultaneous-curriculum"
    STAGED = "staged"
    STAGED_REVERSED = "staged-reversed"
    REPLAY = "staged-replay"


DESCRIPTIONS: Mapping[Arm, str] = {
    Arm.SIMULTANEOUS: "every batch has all environments in equal shares",
    Arm.CURRICULUM: "the same, with tasks chosen by pass rate, from easy to hard",
    Arm.STAGED: "one environment after another",
    Arm.STAGED_REVERSED: "the same in the opposite order",
    Arm.REPLAY: "one environment after another, with a share of all others in every batch",
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One `rl` run of a cell."""

    prompts: Mapping[str, int]
    """Prompts of a batch by environment."""
    steps: int
    """Updates."""
    curriculum: CurriculumConfig | None = None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training of the study."""

    arm: Arm
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"lr-{self.learning_rate!r}-seed-{self.seed}-{self.arm}"


def parts_of(study: SimultaneousRL, arm: Arm, steps: int) -> list[Part]:
    """The runs of a cell, with `steps` updates in all."""
    names = [environment.name for environment in study.run.environments]
    stage, share = steps // len(names), study.prompts // len(names)
    equal = dict.fromkeys(names, share)
    match arm:
        case Arm.SIMULTANEOUS:
            return [Part(prompts=equal, steps=steps)]
        case Arm.CURRICULUM:
            return [Part(prompts=equal, steps=steps, curriculum=study.curriculum)]
        case Arm.STAGED:
            return [Part(prompts={name: study.prompts}, steps=stage) for name in names]
        case Arm.STAGED_REVERSED:
            return parts_of(study, Arm.STAGED, steps)[::-1]
        case Arm.REPLAY:
            others = min(share, max(1, round(study.replay * study.prompts / (len(names) - 1))))
            own = study.prompts - others * (len(names) - 1)
            return [
                Part(prompts=dict.fromkeys(names, others) | {name: own}, steps=stage)
                for name in names
            ]


def run_of(
    study: SimultaneousRL,
    part: Part,
    index: int,
    *,
    cell: Cell,
    model: str,
    stage: int,
) -> RLRun:
    """The run of a cell's part, which keeps a checkpoint of every `stage` updates."""
    base = study.run
    by_name = {environment.name: environment for environment in base.environments}
    warmup = min(max(1, part.steps // 16), part.steps - 1)
    shape = base.training.schedule
    if not isinstance(shape, WSD):
        shape = WSD(total_steps=1, warmup_steps=0, decay_steps=1)
    schedule = replace(
        shape,
        total_steps=part.steps,
        warmup_steps=warmup,
        decay_steps=part.steps - warmup,
    )
    rate = base.training.optimizer.lr
    groups = tuple(
        replace(group, lr_scale=group.lr_scale * rate / cell.learning_rate)
        if group.lr_scale != 1.0
        else group
        for group in base.training.parameter_groups
    )
    training = replace(
        base.training,
        steps=part.steps,
        parameter_groups=groups,
        optimizer=replace(base.training.optimizer, lr=cell.learning_rate),
        schedule=schedule,
        evaluate_every_steps=part.steps,
        checkpoint_every_steps=stage,
    )
    environments = tuple(
        replace(by_name[name], weight=count - 1 + _TRACE) for name, count in part.prompts.items()
    )
    weights = {environment.name: environment.weight for environment in environments}
    assert quotas(weights, study.prompts) == part.prompts
    return replace(
        base,
        name=f"part-{index}",
        model=model,
        seed=study.num_stages * cell.seed + index,
        environments=environments,
        training=training,
        curriculum=part.curriculum,
        max_rounds=1,
        # The study plays held-out tasks of all environments itself; a run has those of its own.
        held_out_tasks=1,
        final_held_out_tasks=1,
        retention=RetentionConfig(keep_last=part.steps // stage + 1),
        log_rollouts_every_steps=part.steps,
    )


def profiling_rollouts(parts: Sequence[Part]) -> int:
    """Rollouts that measure pass rates and are not trained on."""
    return sum(
        part.curriculum.pool * part.curriculum.samples * len(part.prompts)
        for part in parts
        if part.curriculum is not None
    )
