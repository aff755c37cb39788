"""Cross-entropy of the trained tokens, each with its weight.

    L = sum over depths k of lambda_k  sum_i n_i w_i CE(logits_k,i, target_k,i)

lambda is 1 for the main head and lambda / D for each of D depths of multi-token prediction. With
w = 1 this is the loss of pre-training and of supervised fine-tuning, whose mask leaves prompts out.
With advantages as weights it is the policy gradient at ratio 1: GRPO with one update per batch of
rollouts (white paper, section 2.6).

n_i averages the tokens over the *global* batch (see objective.py):

* per token: 1 / number of trained tokens. A long answer has more weight than a short one.
* per sequence: 1 / (trained tokens of its sequence * number of sequences with any). Every
  conversation has equal weight.

Each depth divides by its own count. The count falls with the depth, because the last tokens of a
sequence have no target k positions further. So a token has weight lambda / D at each depth, as in
Megatron's per-token normalisation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, Literal

import torch
from torch import Tensor

from nemotron3.errors import ConfigError
from nemotron3.models.nemotron_h import ModelOutput
from nemotron3.ops.cross_entropy import linear_cross_entropy
from nemotron3.ops.segments import Segments
from nemotron3.training.batch import TrainBatch
from nemotron3.training.objective import BatchT, LossTerms

Normalisation = Literal["token", "sequence"]


@dataclass(frozen=True, kw_only=True)
class TokenLossConfig:
    """How the losses of tokens are combined."""

    normalisation: Normalisation = "token"
    """`token`: all trained tokens have equal weight; `sequence`: all sequences have."""
    mtp_loss_scaling: float = 0.0
    """Weight of all MTP depths together; 0 leaves the MTP block out."""

    def __post_init__(self) -> None:
        check_scaling(self.mtp_loss_scaling)


def check_scaling(mtp_loss_scaling: float) -> None:
    """Raise ConfigError for an invalid weight of the MTP depths."""
    if not mtp_loss_scaling >= 0:
        raise ConfigError(f"is {mtp_loss_scaling}; it must be 0 or more", field="mtp_loss_scaling")


class TokenObjective(Generic[BatchT]):
    """The weighted loss of masked tokens: an `Objective` for `TrainBatch` and its subclasses."""

    detach_mtp = False

    def __init__(self, config: TokenLossConfig, *, num_mtp_depths: int) -> None:
        """`num_mtp_depths` is the model's, `ModelConfig.pattern.num_mtp_depths`."""
        if config.mtp_loss_scaling and not num_mtp_depths:
            raise ConfigError(
                f"mtp_loss_scaling is {config.mtp_loss_scaling} and the model has no MTP block; "
                "set it to 0"
            )
        self.config = config
        self._num_mtp_depths = num_mtp_depths

    @property
    def mtp_depths(self) -> int:
        """All depths of the model, or 0 if their weight is 0."""
        return self._num_mtp_depths if self.config.mtp_loss_scaling else 0

    def normalisation(self, batch: BatchT) -> Normalisation:
        """Whether all tokens, or all sequences, of a batch have equal weight."""
        del batch  # for subclasses in which it depends on the batch
        return self.config.normalisation

    def counts(self, batch: BatchT) -> dict[str, float]:
        """The number of trained tokens, or of sequences with any, at each depth."""
        return {
            _name("targets", depth): _count(batch, depth, self.normalisation(batch))
            for depth in range(self.mtp_depths + 1)
        }

    def loss(self, output: ModelOutput, batch: BatchT, counts: Mapping[str, float]) -> LossTerms:
        """The sum over all depths; the metrics are the loss in nats and the accuracy at each."""
        total = output.hidden[0].new_zeros((), dtype=torch.float32)
        metrics: dict[str, Tensor] = {}
        for depth, hidden in enumerate(output.hidden):
            targets, mask, weights = batch.at_depth(depth)
            shares = _shares(
                mask, batch.segments, counts[_name("targets", depth)], self.normalisation(batch)
            )
            scored = linear_cross_entropy(
                hidden,
                output.output_weight,
                targets,
                shares if weights is None else shares * weights,
            )
            scaling = 1.0 if depth == 0 else self.config.mtp_loss_scaling / self.mtp_depths
            total = total + scaling * scored.total
            metrics[_name("train/loss", depth)] = scored.total.detach()
            accuracy = "train/accuracy" if depth == 0 else f"train/mtp_accuracy_{depth}"
            metrics[accuracy] = (scored.correct * shares).sum()
        return LossTerms(total, metrics)


def _shares(mask: Tensor, segments: Segments, count: float, normalisation: Normalisation) -> Tensor:
    """Each target's weight in the mean over the global batch."""
    count = max(count, 1.0)
    if normalisation == "token":
        return mask / count
    lengths = _trained(mask, segments).clamp_min(1e-20)  # without targets the mask is 0
    return mask / lengths[segments.ids(mask.device)] / count


def _name(name: str, depth: int) -> str:
    return name if depth == 0 else f"{name}_mtp_{depth}"


def _count(batch: TrainBatch, depth: int, normalisation: Normalisation) -> float:
    mask = batch.at_depth(depth).mask
    if normalisation == "token":
        return float(mask.sum())
    return float((_trained(mask, batch.segments) > 0).sum())


def _trained(mask: Tensor, segments: Segments) -> Tensor:
    """Trained tokens of each sequence."""
    return mask.new_zeros(len(segments)).index_add_(0, segments.ids(mask.device), mask)
