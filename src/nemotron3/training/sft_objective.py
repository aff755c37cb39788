"""The loss of supervised fine-tuning: that of pre-training on the targets of a mask.

Super is fine-tuned in two stages: the mean over all trained tokens, then the mean over
conversations of each one's mean, because with the first alone long answers dominated and short
answers to long inputs became worse (Super report, supervised fine-tuning). Each batch says which it
is.
"""

from dataclasses import dataclass

from nemotron3.errors import ConfigError
from nemotron3.training.batch import TrainBatch
from nemotron3.training.pretrain_objective import PretrainLossConfig, PretrainObjective
from nemotron3.training.token_objective import Normalisation


@dataclass(frozen=True, kw_only=True)
class NormalisationStage:
    """A part of the training and what counts the same in its loss."""

    normalisation: Normalisation = "token"
    """Whether all trained tokens count the same, or all conversations."""
    until: float = 1.0
    """Where the stage ends, as a fraction of the steps; the last one ends at 1."""


@dataclass(frozen=True, kw_only=True)
class SFTLossConfig(PretrainLossConfig):
    """Weights of the loss terms, and the stages of its normalisation."""

    stages: tuple[NormalisationStage, ...] = (NormalisationStage(),)
    """One after another."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ends = [stage.until for stage in self.stages]
        if not ends or ends != sorted(set(ends)) or ends[0] <= 0 or ends[-1] != 1:
            raise ConfigError(f"end at {ends}; they must grow, above 0, to 1", field="loss.stages")

    def normalisation(self, fraction: float) -> Normalisation:
        """That of an update, behind which this fraction of the steps lies."""
        return next(stage.normalisation for stage in self.stages if fraction < stage.until)


@dataclass(frozen=True, kw_only=True)
class SFTBatch(TrainBatch):
    """A microbatch of conversations."""

    normalisation: Normalisation


class SFTObjective(PretrainObjective[SFTBatch]):
    """The loss of conversations."""

    def normalisation(self, batch: SFTBatch) -> Normalisation:
        """That of the batch's stage."""
        return batch.normalisation
