"""The pre-training loss: next token, further tokens (MTP), and load balance of experts.

    L = CE + sum_k (lambda / D) CE_k + coefficient * balance

The cross-entropies are those of `token_objective.py`, with weight 1 for every token. The balance
loss is a mean over all tokens of the global batch, including those without a target.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from nemotron3.errors import ConfigError
from nemotron3.models.nemotron_h import ModelOutput
from nemotron3.ops.segments import Segments
from nemotron3.training.balancing import sequence_balance_loss
from nemotron3.training.objective import BatchT, LossTerms
from nemotron3.training.token_objective import TokenLossConfig, TokenObjective, check_scaling


@dataclass(frozen=True, kw_only=True)
class PretrainLossConfig:
    """Weights of the loss terms."""

    mtp_loss_scaling: float = 0.3
    """Lambda, the weight of all MTP depths together: 0.3 for Super, 0.1 for Ultra; 0 leaves the MTP
    block out. It has no effect on a model without one."""
    balance_loss: float = 1e-4
    """Factor of the sequence-level balance loss (the default is the reports'); 0 leaves it out."""

    def __post_init__(self) -> None:
        check_scaling(self.mtp_loss_scaling)
        if not self.balance_loss >= 0:
            raise ConfigError(f"is {self.balance_loss}; it must be 0 or more", field="balance_loss")


class PretrainObjective(TokenObjective[BatchT]):
    """Next-token prediction with the MTP and balance losses of the reports."""

    def __init__(self, config: PretrainLossConfig, *, num_mtp_depths: int) -> None:
        """`num_mtp_depths` is the model's, `ModelConfig.pattern.num_mtp_depths`."""
        scaling = config.mtp_loss_scaling if num_mtp_depths else 0.0
        super().__init__(TokenLossConfig(mtp_loss_scaling=scaling), num_mtp_depths=num_mtp_depths)
        self._balance_loss = config.balance_loss

    def counts(self, batch: BatchT) -> dict[str, float]:
        """The number of targets at each depth, and of tokens."""
        return super().counts(batch) | {"tokens": float(batch.segments.total)}

    def loss(self, output: ModelOutput, batch: BatchT, counts: Mapping[str, float]) -> LossTerms:
        """The cross-entropies and the balance loss; the latter is the metric `train/aux_loss`."""
        total, metrics = super().loss(output, batch, counts)
        balance = _balance(output, batch.segments) / counts["tokens"]
        if self._balance_loss:
            total = total + self._balance_loss * balance
        return LossTerms(total, metrics | {"train/aux_loss": balance.detach()})


def _balance(output: ModelOutput, segments: Segments) -> Tensor:
    """Balance loss over all MoE layers; the shared MTP block counts once, as its depths' mean."""
    total = output.hidden[0].new_zeros(())
    for routing in output.routings:
        total = total + sequence_balance_loss(routing, segments)
    for depth_routings in output.mtp_routings:
        for routing in depth_routings:
            total = total + sequence_balance_loss(routing, segments) / len(output.mtp_routings)
    return total
