r"""The loss of GRPO as the reports run it.

    L = sum_t m_t w_t (-A_t r_t) / sum_t m_t  +  beta KL

over the sampled tokens of the whole batch (`m`), with one update for a batch of rollouts: then the
ratio to the policy before the update is r = exp(logp - sg logp) = 1, with the gradient of logp, and
PPO's clipping never applies.

w corrects for what the engine computes otherwise than training does, and for tokens of earlier
weights: w = exp(logp - logp of the engine), detached. It is clipped (truncated importance
sampling: [0, 5] for Super, [0.2, 5] for Ultra) or masked outside of the bounds (IcePop, the paper's
"masked importance sampling"). A sequence whose mean of exp |logp - logp of the engine| is above a
threshold, 2 in all recipes, is left out: something is wrong with it.

KL is that to a frozen reference, by the estimator k3 = exp(x) - 1 - x where x is the reference's
logp - logp.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nemotron3.errors import ConfigError
from nemotron3.models.nemotron_h import ModelOutput
from nemotron3.ops.cross_entropy import linear_cross_entropy, token_logprobs
from nemotron3.training.batch import TrainBatch
from nemotron3.training.objective import LossTerms
from nemotron3.training.token_objective import check_scaling

Correction = Literal["clip", "mask", "none"]


@dataclass(frozen=True, kw_only=True)
class PolicyLossConfig:
    """The correction between engine and training, and the pull to a reference."""

    correction: Correction = "mask"
    """What happens to importance weights outside of the bounds; none leaves all as they are."""
    lowest: float = 0.5
    """Lower bound of an importance weight."""
    highest: float = 5.0
    """Upper bound of an importance weight."""
    sequence_threshold: float | None = 2.0
    """Largest mean of exp |difference of log-probabilities| of a sequence; null for any."""
    kl: float = 0.0
    """Weight of the KL to the reference; 0 needs none."""
    mtp_loss_scaling: float = 0.0
    """Weight of all MTP depths together, 0.3 for Super. They learn to predict what was sampled, and
    backbone, embedding and output layer learn nothing from it; 0 leaves the MTP block as it is."""

    def __post_init__(self) -> None:
        if self.correction not in ("clip", "mask", "none"):
            raise ConfigError(
                f"is {self.correction!r}; it must be clip, mask or none",
                field="correction",
            )
        if not 0 <= self.lowest <= 1 <= self.highest:
            raise ConfigError(
                f"importance weights are bounded by {self.lowest} and {self.highest}; 1 must lie "
                "between them"
            )
        if self.sequence_threshold is not None and not self.sequence_threshold > 1:
            raise ConfigError(
                f"is {self.sequence_threshold}; it must be above 1, the value "
                "of equal log-probabilities",
                field="sequence_threshold",
            )
        if not self.kl >= 0:
            raise ConfigError(f"is {self.kl}; it must be 0 or more", field="kl")
        check_scaling(self.mtp_loss_scaling)


@dataclass(frozen=True, kw_only=True)
class PolicyBatch(TrainBatch):
    """A microbatch of rollouts: `mask` are sampled tokens, `weights` their advantages."""

    sampled_logprobs: Tensor
    """Log-probability of each target when it was sampled, float32 [tokens]; any number where the
    mask is 0."""
    reference_logprobs: Tensor | None = None
    """Those of the reference; None where the loss has no KL."""
    is_current: Tensor | None = None
    """1 for targets that the weights in training have sampled, float32 [tokens], 0 for others:
    there engine and training must agree. None where all sampled tokens are."""

    @property
    def current(self) -> Tensor:
        """`is_current`, 0 where the mask is 0."""
        return self.mask if self.is_current is None else self.mask * self.is_current


class PolicyObjective:
    """`Objective` of rollouts."""

    detach_mtp = True

    def __init__(self, config: PolicyLossConfig, *, num_mtp_depths: int = 0) -> None:
        """`num_mtp_depths` are those of the model, `ModelConfig.pattern.num_mtp_depths`."""
        if config.mtp_loss_scaling and not num_mtp_depths:
            raise ConfigError(
                f"is {config.mtp_loss_scaling} and the model has no MTP block; set it to 0",
                field="mtp_loss_scaling",
            )
        self.config = config
        self.mtp_depths = num_mtp_depths if config.mtp_loss_scaling else 0

    def counts(self, batch: PolicyBatch) -> dict[str, float]:
        """Sampled tokens, those of the current weights, and those that each depth can predict."""
        sampled = {"tokens": batch.mask, "current": batch.current}
        return {name: float(mask.sum()) for name, mask in sampled.items()} | {
            f"targets_mtp_{depth}": float(batch.at_depth(depth).mask.sum())
            for depth in range(1, self.mtp_depths + 1)
        }

    def loss(
        self, output: ModelOutput, batch: PolicyBatch, counts: Mapping[str, float]
    ) -> LossTerms:
        """The share of a microbatch, and how far engine and training are apart.

        Metrics are means over sampled tokens: `policy/entropy` estimates the entropy from the
        sampled log-probabilities, `policy/kl_engine` is k3 between engine and training.
        `policy/logprob_error_current` is the mean over tokens of the current weights alone, and
        `policy/current` their share.
        """
        assert batch.weights is not None
        count = max(counts["tokens"], 1.0)
        at = batch.mask.nonzero().squeeze(1)  # the rest needs no row of the output layer
        logprobs = token_logprobs(output.hidden[0][at], output.output_weight, batch.targets[at])
        now = logprobs.detach()
        difference = now - batch.sampled_logprobs[at]
        weights = self._importance(difference) * self._agreement(difference, batch, at)
        ratio = (logprobs - now).exp()
        total = -(weights * batch.weights[at] * ratio).sum() / count
        current = batch.current[at]
        metrics = {
            "policy/entropy": -now.sum() / count,
            "policy/kl_engine": (difference.neg().expm1() + difference).sum() / count,
            "policy/logprob_error": difference.abs().sum() / count,
            "policy/logprob_error_current": (difference.abs() * current).sum()
            / max(counts["current"], 1.0),
            "policy/current": current.sum() / count,
            "policy/kept": (weights != 0).sum() / count,
        }
        if self.config.kl:
            assert batch.reference_logprobs is not None, "a KL needs a reference"
            x = batch.reference_logprobs[at] - logprobs
            kl = (x.expm1() - x).sum() / count
            total = total + self.config.kl * kl
            metrics["policy/kl_reference"] = kl.detach()
        metrics["train/loss"] = total.detach()
        for depth in range(1, self.mtp_depths + 1):
            loss = self._mtp_loss(output, batch, depth) / max(counts[f"targets_mtp_{depth}"], 1.0)
            total = total + self.config.mtp_loss_scaling / self.mtp_depths * loss
            metrics[f"train/loss_mtp_{depth}"] = loss.detach()
        return LossTerms(total, metrics)

    def _mtp_loss(self, output: ModelOutput, batch: PolicyBatch, depth: int) -> Tensor:
        """Sum of the cross-entropies of the sampled tokens, whatever their advantages."""
        targets, mask, _ = batch.at_depth(depth)
        at = mask.nonzero().squeeze(1)
        weight = output.output_weight
        weight = weight.detach() if isinstance(weight, Tensor) else weight
        return linear_cross_entropy(output.hidden[depth][at], weight, targets[at], mask[at]).total

    def _importance(self, difference: Tensor) -> Tensor:
        weights = difference.exp()
        low, high = self.config.lowest, self.config.highest
        if self.config.correction == "clip":
            return weights.clamp(low, high)
        if self.config.correction == "mask":
            return weights * ((weights >= low) & (weights <= high))
        return weights

    def _agreement(self, difference: Tensor, batch: PolicyBatch, at: Tensor) -> Tensor:
        """1 for the tokens of sequences whose log-probabilities agree well enough, else 0."""
        if self.config.sequence_threshold is None:
            return torch.ones_like(difference)
        ids = batch.segments.ids(difference.device)[at]
        sums = difference.new_zeros(2, len(batch.segments))
        sums[0].index_add_(0, ids, difference.abs().exp())
        sums[1].index_add_(0, ids, torch.ones_like(difference))
        agrees = sums[0] <= self.config.sequence_threshold * sums[1]
        return agrees.to(difference.dtype)[ids]
