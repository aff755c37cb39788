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
from nemotron3.ops.cross_entropy import token_logprobs
from nemotron3.training.batch import TrainBatch
from nemotron3.training.objective import LossTerms

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


@dataclass(frozen=True, kw_only=True)
class PolicyBatch(TrainBatch):
    """A microbatch of rollouts: `mask` are sampled tokens, `weights` their advantages."""

    sampled_logprobs: Tensor
    """Log-probability of each target when it was sampled, float32 [tokens]; any number where the
    mask is 0."""
    reference_logprobs: Tensor | None = None
    """Those of the reference; None where the loss has no KL."""


class PolicyObjective:
    """`Objective` of rollouts."""

    mtp_depths = 0

    def __init__(self, config: PolicyLossConfig) -> None:
        self.config = config

    def counts(self, batch: PolicyBatch) -> dict[str, float]:
        """Sampled tokens."""
        return {"tokens": float(batch.mask.sum())}

    def loss(
        self, output: ModelOutput, batch: PolicyBatch, counts: Mapping[str, float]
    ) -> LossTerms:
        """The share of a microbatch, and how far engine and training are apart.

        Metrics are means over sampled tokens: `policy/entropy` estimates the entropy from the
        sampled log-probabilities, `policy/kl_engine` is k3 between engine and training.
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
        metrics = {
            "policy/entropy": -now.sum() / count,
            "policy/kl_engine": (difference.neg().expm1() + difference).sum() / count,
            "policy/logprob_error": difference.abs().sum() / count,
            "policy/kept": (weights != 0).sum() / count,
        }
        if self.config.kl:
            assert batch.reference_logprobs is not None, "a KL needs a reference"
            x = batch.reference_logprobs[at] - logprobs
            kl = (x.expm1() - x).sum() / count
            total = total + self.config.kl * kl
            metrics["policy/kl_reference"] = kl.detach()
        return LossTerms(total, {"train/loss": total.detach()} | metrics)

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
