"""The pre-training loss: next token, further tokens by MTP, and the balance of experts.

    L = CE + sum_k (lambda / D) CE_k + coefficient * balance

Every mean is over the *global* batch: each term is a sum over tokens divided by a count that is
known before the first microbatch runs. So the loss and its gradient are the same for any split into
microbatches and for any packing. CE_k is divided by the number of tokens that have a target k
places further, which is fewer than CE has, so that each depth weighs lambda / D per token as in
Megatron's per-token normalisation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nemotron3.errors import ConfigError
from nemotron3.models.experts import Routing
from nemotron3.models.layout import SequenceLayout, shift_left
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.ops.cross_entropy import linear_cross_entropy
from nemotron3.ops.segments import Segments
from nemotron3.training.balancing import BalanceConfig, expert_load, sequence_balance_loss


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the loss terms."""

    mtp_loss_scaling: float = 0.3
    """Lambda, the weight of all MTP depths together: 0.3 for Super, 0.1 for Ultra."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    """Balancing of experts."""

    def __post_init__(self) -> None:
        if not self.mtp_loss_scaling >= 0:
            raise ConfigError(f"mtp_loss_scaling is {self.mtp_loss_scaling}; it must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Tokens of a microbatch with what they should predict."""

    tokens: Tensor
    """Input ids, int64 [tokens]."""
    targets: Tensor
    """The id after each token, int64 [tokens]."""
    mask: Tensor
    """Weight of each target, float32 [tokens]; 0 where there is none."""
    segments: Segments
    """Where sequences begin."""

    def at_depth(self, depth: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, targets and mask of an MTP depth; depth 0 is the main head's."""
        if depth == 0:
            return self.tokens, self.targets, self.mask
        tokens, _ = shift_left(self.tokens, self.segments, depth)
        targets, _ = shift_left(self.targets, self.segments, depth)
        mask, _ = shift_left(self.mask, self.segments, depth)  # 0 where a sequence has ended
        return tokens, targets, mask

    def counts(self, depths: int) -> list[float]:
        """Number of targets of the main head and of each depth."""
        return [float(self.at_depth(depth)[2].sum()) for depth in range(depths + 1)]


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """What one microbatch adds to the loss and to the statistics of its global batch."""

    total: Tensor
    """Its share of the whole loss: the part that carries gradients."""
    losses: list[float]
    """Its share of the mean loss, in nats, of the main head and of each depth."""
    accuracies: list[float]
    """Its share of the fraction of right best guesses, likewise."""
    balance: float
    """Its share of the balance loss, without its factor."""
    loads: list[Tensor]
    """Load of each router's experts, in the order of `LanguageModel.routers`."""
    residual_rms: list[Tensor]
    """Size of the residual stream after each block, where it was measured."""


def loss_terms(
    model: LanguageModel,
    batch: Targets,
    counts: Sequence[float],
    config: LossConfig,
    *,
    total_tokens: int,
    recompute: bool = False,
    measure: bool = False,
) -> LossTerms:
    """The loss of one microbatch as its share of a global batch.

    `counts` are the targets of the global batch by depth, `total_tokens` its tokens.
    """
    layout, mtp = SequenceLayout(batch.segments), model.mtp
    backbone = model.backbone(
        model.embed(batch.tokens), layout, recompute=recompute, measure=measure
    )
    hidden, routings = backbone.hidden, backbone.routings
    depths = model.config.pattern.num_mtp_depths
    total = hidden.new_zeros((), dtype=torch.float32)
    losses, accuracies = [], []
    mtp_routings: list[list[Routing]] = []
    for depth in range(depths + 1):
        tokens, targets, mask = batch.at_depth(depth)
        if depth > 0:
            assert mtp is not None
            embedded = model.embed(tokens)
            if recompute:
                hidden, routed = checkpoint(
                    mtp, embedded, hidden, layout, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden, routed = mtp(embedded, hidden, layout)
            mtp_routings.append(routed)
        count = max(counts[depth], 1.0)
        scored = linear_cross_entropy(hidden, model.output_weight, targets, mask / count)
        weight = 1.0 if depth == 0 else config.mtp_loss_scaling / depths
        total = total + weight * scored.total
        losses.append(scored.total.item())
        accuracies.append((scored.correct * mask).sum().item() / count)
    balance = _balance(routings, mtp_routings, batch.segments) / total_tokens
    if config.balance.sequence_loss:
        total = total + config.balance.sequence_loss * balance
    loads = [expert_load(routing) for routing in routings]
    loads += [
        torch.stack([expert_load(routing) for routing in depth_routings]).sum(0)
        for depth_routings in zip(*mtp_routings, strict=True)
    ]
    return LossTerms(
        total=total,
        losses=losses,
        accuracies=accuracies,
        balance=float(balance.detach()),
        loads=loads,
        residual_rms=backbone.residual_rms,
    )


def _balance(
    routings: list[Routing], mtp_routings: list[list[Routing]], segments: Segments
) -> Tensor:
    """Balance loss over all mixtures; the shared MTP block's counts once, as its depths' mean."""
    total = torch.zeros(())
    for routing in routings:
        total = total + sequence_balance_loss(routing, segments)
    for depth_routings in mtp_routings:
        for routing in depth_routings:
            total = total + sequence_balance_loss(routing, segments) / len(mtp_routings)
    return total
