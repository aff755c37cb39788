"""From rollouts and their advantages to the microbatches of one update."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemotron3.data.packing import pack_best_fit
from nemotron3.models.routes import RecordedRoutes
from nemotron3.ops.segments import Segments
from nemotron3.rl.policy_objective import PolicyBatch
from nemotron3.rl.reward_shaping import RewardShapingConfig, token_advantages
from nemotron3.rl.rollouts import Rollout


def policy_batches(
    rollouts: Sequence[Rollout],
    advantages: Sequence[float],
    *,
    max_tokens: int,
    shaping: RewardShapingConfig | None = None,
    version: int | None = None,
    device: torch.device | str = "cpu",
) -> list[PolicyBatch]:
    """Rollouts in packed streams of at most `max_tokens` tokens, each a segment of its own.

    Every sampled token of a rollout has its advantage, but for the turns that `shaping` penalizes.
    `version` is that of the weights that are trained; without it, all tokens count as theirs.
    """
    shaping = shaping or RewardShapingConfig()
    trained = [
        (rollout, token_advantages(rollout, advantage, shaping))
        for rollout, advantage in zip(rollouts, advantages, strict=True)
        if rollout.num_sampled
    ]
    rows = pack_best_fit([len(rollout.ids) - 1 for rollout, _ in trained], max_tokens)
    return [_batch([trained[index] for index in row], version, device) for row in rows]


def _batch(
    rollouts: Sequence[tuple[Rollout, Sequence[float]]],
    version: int | None,
    device: torch.device | str,
) -> PolicyBatch:
    def joined(parts: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
        return torch.tensor([x for part in parts for x in part], dtype=dtype, device=device)

    each = [rollout for rollout, _ in rollouts]
    mask = joined([rollout.is_sampled[1:] for rollout in each], torch.float32)
    spread = [advantages[1:] for _, advantages in rollouts]
    current = [_is_current(rollout, version) for rollout in each]
    return PolicyBatch(
        tokens=joined([rollout.ids[:-1] for rollout in each], torch.int64),
        targets=joined([rollout.ids[1:] for rollout in each], torch.int64),
        mask=mask,
        weights=joined(spread, torch.float32),
        sampled_logprobs=joined([rollout.logprobs[1:] for rollout in each], torch.float32),
        segments=Segments([len(rollout.ids) - 1 for rollout in each]),
        is_current=joined(current, torch.float32),
        routes=_routes(each, device),
    )


def _is_current(rollout: Rollout, version: int | None) -> list[bool]:
    """Which tokens but the first a forward pass with the weights of `version` scores alike."""
    if version is None:
        return [True] * (len(rollout.ids) - 1)
    is_whole = not rollout.continues_old_states
    return [is_whole and used == version for used in rollout.weight_versions[1:]]


def _routes(rollouts: Sequence[Rollout], device: torch.device | str) -> RecordedRoutes | None:
    """The experts that the engine chose, for the training pass to choose again.

    None where the engine did not record them. The MTP block's own are never replayed: drafts were
    made from other hidden states.
    """
    recorded = [rollout.routes for rollout in rollouts if rollout.routes is not None]
    if len(recorded) != len(rollouts):
        return None
    chosen = torch.cat(recorded).to(device, torch.int64)  # [tokens, layers, choices]
    return RecordedRoutes(backbone=chosen.unbind(1))
