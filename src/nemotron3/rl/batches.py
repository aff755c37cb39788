"""From rollouts and their advantages to the microbatches of one update.

The rollouts of a group have one prompt. It is computed once where the model can continue a prefix
(`SequenceLayout.prefixes`): attention, scan and convolution of each answer go on from it, and its
gradients are the sums over its answers. All of its tokens but the last are shared, because what
comes after that one differs.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from nemotron3.data.packing import pack_best_fit
from nemotron3.models.routes import RecordedRoutes
from nemotron3.ops.segments import Segments
from nemotron3.rl.policy_objective import PolicyBatch
from nemotron3.rl.reward_shaping import RewardShapingConfig, token_advantages
from nemotron3.rl.rollouts import Rollout


class _Part(NamedTuple):
    """Tokens `start` to `end` of a rollout, each with the next one as its target."""

    rollout: Rollout
    advantages: Sequence[float]
    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def targets(self) -> slice:
        return slice(self.start + 1, self.end + 1)


class _Group(NamedTuple):
    """A sequence, and those that continue it."""

    first: _Part
    rest: Sequence[_Part] = ()

    @property
    def length(self) -> int:
        return self.first.length + sum(part.length for part in self.rest)


def policy_batches(
    rollouts: Sequence[Rollout],
    advantages: Sequence[float],
    *,
    max_tokens: int,
    shares_prompts: bool = False,
    shaping: RewardShapingConfig | None = None,
    version: int | None = None,
    device: torch.device | str = "cpu",
) -> list[PolicyBatch]:
    """Rollouts in packed streams of at most `max_tokens` tokens, each a segment of its own.

    With `shares_prompts` a prompt of several rollouts is one segment, which theirs continue. Every
    sampled token of a rollout has its advantage, but for the turns that `shaping` penalizes.
    `version` is that of the weights that are trained; without it, all tokens count as theirs.
    """
    shaping = shaping or RewardShapingConfig()
    wholes = [
        _Part(rollout, token_advantages(rollout, advantage, shaping), 0, len(rollout.ids) - 1)
        for rollout, advantage in zip(rollouts, advantages, strict=True)
        if rollout.num_sampled
    ]
    groups = _with_shared_prompts(wholes, max_tokens) if shares_prompts else map(_Group, wholes)
    groups = list(groups)
    rows = pack_best_fit([group.length for group in groups], max_tokens)
    return [_batch([groups[index] for index in row], version, device) for row in rows]


def _with_shared_prompts(wholes: Sequence[_Part], max_tokens: int) -> list[_Group]:
    """Rollouts of one prompt together, in several groups where one would have too many tokens."""
    alike: dict[object, list[_Part]] = {}
    for whole in wholes:
        rollout = whole.rollout
        end = rollout.is_sampled.index(True) - 1  # the last token of the prompt
        # An engine that was given new weights meanwhile may have read a prompt with other experts.
        routes = None if rollout.routes is None else rollout.routes[:end].cpu().numpy().tobytes()
        key = (tuple(rollout.ids[: end + 1]), routes) if end > 0 else id(rollout)
        alike.setdefault(key, []).append(whole)
    groups: list[_Group] = []
    for same in alike.values():
        end = same[0].rollout.is_sampled.index(True) - 1
        parts: list[_Part] = []
        room = 0
        for part in (whole._replace(start=end) for whole in same):
            if part.length > room and parts:
                groups.append(_joined(parts))
                parts = []
            room = (room if parts else max_tokens - end) - part.length
            parts.append(part)
        groups.append(_joined(parts))
    return groups


def _joined(parts: Sequence[_Part]) -> _Group:
    """Parts that continue the same prompt, after that prompt."""
    if len(parts) == 1:
        return _Group(parts[0]._replace(start=0))
    return _Group(parts[0]._replace(start=0, end=parts[0].start), parts)


def _batch(
    groups: Sequence[_Group], version: int | None, device: torch.device | str
) -> PolicyBatch:
    parts = [group.first for group in groups] + [part for group in groups for part in group.rest]

    def joined(values: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
        """The values of the targets, of which each rollout has one for each of its ids."""
        of_targets = (v[part.targets] for part, v in zip(parts, values, strict=True))
        return torch.tensor([*chain.from_iterable(of_targets)], dtype=dtype, device=device)

    each = [part.rollout for part in parts]
    tokens = chain.from_iterable(part.rollout.ids[part.start : part.end] for part in parts)
    return PolicyBatch(
        tokens=torch.tensor([*tokens], dtype=torch.int64, device=device),
        targets=joined([rollout.ids for rollout in each], torch.int64),
        mask=joined([rollout.is_sampled for rollout in each], torch.float32),
        weights=joined([part.advantages for part in parts], torch.float32),
        sampled_logprobs=joined([rollout.logprobs for rollout in each], torch.float32),
        segments=Segments(part.length for part in parts),
        prefixes=tuple(place for place, group in enumerate(groups) for _ in group.rest),
        is_current=joined([_is_current(rollout, version) for rollout in each], torch.float32),
        routes=_routes(parts, device),
    )


def _is_current(rollout: Rollout, version: int | None) -> list[bool]:
    """Which tokens a forward pass with the weights of `version` scores as the engine did."""
    if version is None:
        return [True] * len(rollout.ids)
    is_whole = not rollout.continues_old_states
    return [is_whole and used == version for used in rollout.weight_versions]


def _routes(parts: Sequence[_Part], device: torch.device | str) -> RecordedRoutes | None:
    """The experts that the engine chose, for the training pass to choose again.

    None where the engine did not record them. The MTP block's own are never replayed: drafts were
    made from other hidden states.
    """
    recorded = [
        part.rollout.routes[part.start : part.end]
        for part in parts
        if part.rollout.routes is not None
    ]
    if len(recorded) != len(parts):
        return None
    chosen = torch.cat(recorded).to(device, torch.int64)  # [tokens, layers, choices]
    return RecordedRoutes(backbone=chosen.unbind(1))
