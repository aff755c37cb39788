"""From rollouts and their advantages to the microbatches of one update."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemotron3.data.packing import pack_best_fit
from nemotron3.ops.segments import Segments
from nemotron3.rl.policy_objective import PolicyBatch
from nemotron3.rl.rollouts import Rollout


def policy_batches(
    rollouts: Sequence[Rollout],
    advantages: Sequence[float],
    *,
    max_tokens: int,
    device: torch.device | str = "cpu",
) -> list[PolicyBatch]:
    """Rollouts in packed streams of at most `max_tokens` tokens, each a segment of its own.

    Every sampled token of a rollout has its advantage.
    """
    trained = [
        (rollout, advantage)
        for rollout, advantage in zip(rollouts, advantages, strict=True)
        if rollout.num_sampled
    ]
    rows = pack_best_fit([len(rollout.ids) - 1 for rollout, _ in trained], max_tokens)
    return [_batch([trained[index] for index in row], device) for row in rows]


def _batch(rollouts: Sequence[tuple[Rollout, float]], device: torch.device | str) -> PolicyBatch:
    def joined(parts: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
        return torch.tensor([x for part in parts for x in part], dtype=dtype, device=device)

    each = [rollout for rollout, _ in rollouts]
    mask = joined([rollout.is_sampled[1:] for rollout in each], torch.float32)
    spread = [[advantage] * (len(rollout.ids) - 1) for rollout, advantage in rollouts]
    return PolicyBatch(
        tokens=joined([rollout.ids[:-1] for rollout in each], torch.int64),
        targets=joined([rollout.ids[1:] for rollout in each], torch.int64),
        mask=mask,
        weights=joined(spread, torch.float32),
        sampled_logprobs=joined([rollout.logprobs[1:] for rollout in each], torch.float32),
        segments=Segments([len(rollout.ids) - 1 for rollout in each]),
    )
