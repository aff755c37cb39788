"""Distillation: the student's distribution of each next token is to be the teacher's.

    L = mean over targets of KL(p_teacher || p_student)

It is the loss of quantization-aware distillation, in which the student is the teacher with rounded
weights (Super report, appendix on QAD: the divergence of logits alone was better than with a loss
of the text or of hidden states; temperature 1). The teacher's hidden states are part of the batch,
and the logits of both are computed from them a part at a time.

The load of experts is not balanced, and the MTP block is not trained: both follow the teacher.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from nemotron3.models.nemotron_h import ModelOutput
from nemotron3.ops.cross_entropy import linear_kl_divergence
from nemotron3.ops.weights import Weight
from nemotron3.training.batch import TrainBatch
from nemotron3.training.objective import LossTerms


@dataclass(frozen=True, kw_only=True)
class DistillBatch(TrainBatch):
    """A microbatch, with what the teacher makes of its tokens."""

    teacher_hidden: Tensor
    """The teacher's hidden states before its output layer, [tokens, d_teacher]."""


class DistillObjective:
    """`Objective` of a student; the teacher's output layer is the same for all batches."""

    mtp_depths = 0
    detach_mtp = False

    def __init__(self, teacher_weight: Weight) -> None:
        """`teacher_weight` is the matrix of the teacher's output layer, [vocab, d_teacher]."""
        self._teacher_weight = teacher_weight

    def counts(self, batch: DistillBatch) -> dict[str, float]:
        """The number of targets."""
        return {"targets": float(batch.mask.sum())}

    def loss(
        self, output: ModelOutput, batch: DistillBatch, counts: Mapping[str, float]
    ) -> LossTerms:
        """The mean divergence; `train/agreement` is how often both have the same first choice."""
        shares = batch.mask / max(counts["targets"], 1.0)
        found = linear_kl_divergence(
            output.hidden[0],
            output.output_weight,
            batch.teacher_hidden,
            self._teacher_weight,
            shares,
        )
        return LossTerms(
            found.total,
            {
                "train/loss": found.total.detach(),
                "train/agreement": (found.agrees * shares).sum(),
            },
        )
