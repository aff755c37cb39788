"""The loss of supervised fine-tuning: that of pre-training, on the targets of a mask.

Super is fine-tuned in two stages. The loss of the first is the mean over all trained tokens; that
of the second is the mean over conversations of each conversation's mean. With the first stage
alone, long answers dominated and short answers to long inputs became worse (Super report,
supervised fine-tuning). Each batch records its normalisation.
"""

from dataclasses import dataclass

from nemotron3.errors import ConfigError
from nemotron3.training.batch import TrainBatch
from nemotron3.training.pretrain_objective import PretrainLossConfig, PretrainObjective
from nemotron3.training.token_objective import Normalisation


@dataclass(frozen=True, kw_only=True)
class NormalisationStage:
    """A part of the training, with the normalisation of its loss."""

    normalisation: Normalisation = "token"
    """`token`: all trained tokens have equal weight; `sequence`: all conversations have."""
    until: float = 1.0
    """Where the stage ends, as a fraction of the steps; the last one ends at 1."""


@dataclass(frozen=True, kw_only=True)
class SFTLossConfig(PretrainLossConfig):
    """Weights of the loss terms, and the stages of its normalisation."""

    stages: tuple[NormalisationStage, ...] = (NormalisationStage(),)
    """The stages, in order."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ends = [stage.until for stage in self.stages]
        if not ends or ends != sorted(set(ends)) or ends[0] <= 0 or ends[-1] != 1:
            raise ConfigError(f"end at {ends}; they must grow, above 0, to 1", field="loss.stages")

    def normalisation(self, fraction: float) -> Normalisation:
        """The normalisation of the update before which this fraction of the steps was made."""
        return next(stage.normalisation for stage in self.stages if fraction < stage.until)


@dataclass(frozen=True, kw_only=True)
class SFTBatch(TrainBatch):
    """A microbatch of conversations."""

    normalisation: Normalisation


class SFTObjective(PretrainObjective[SFTBatch]):
    """The loss of conversations."""

    def normalisation(self, batch: SFTBatch) -> Normalisation:
        """The normalisation of the batch's stage."""
        return batch.normalisation
