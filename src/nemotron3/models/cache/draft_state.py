"""What the multi-token-prediction block has read of each slot, and what waits to be read by it.

The block reads, at each position, the model's hidden state there and the token after it. So of a
prompt the last token's hidden state waits for the token that comes next. What was chosen while
nothing is drafted waits as well, in parts, until it is read in one go.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class PendingTokens(NamedTuple):
    """Tokens of a sequence that the block has yet to read."""

    tokens: tuple[int, ...]
    hidden: Float[Tensor, "tokens d_model"]
    """The model's state before each of them."""

    @classmethod
    def join(cls, parts: "Sequence[PendingTokens]") -> "PendingTokens":
        """Parts that follow one another as one."""
        tokens = tuple(token for part in parts for token in part.tokens)
        return cls(tokens, torch.cat([part.hidden for part in parts]))


@dataclass(frozen=True)
class DraftSnapshot:
    """What a slot's `DraftState` held at one moment.

    The last token is left out of what is pending: another may come there.
    """

    length: int
    hidden: Tensor
    pending: PendingTokens | None

    @property
    def nbytes(self) -> int:
        """Memory that grows with what is pending."""
        return 0 if self.pending is None else self.pending.hidden.nbytes


class DraftState:
    """Lengths, hidden states and pending tokens of all slots."""

    def __init__(
        self, slots: int, hidden_size: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.lengths = [0] * slots
        """How much of each sequence the block has read. With what is pending it is as long as the
        sequence while that is written, and one token shorter in a prompt."""
        self._hidden = torch.zeros(slots, hidden_size, dtype=dtype, device=device)
        """The model's state at the last token of each prompt, which the block reads with the next
        one; of a sequence that is written, at the last token that the block has read."""
        self._pending: list[list[PendingTokens]] = [[] for _ in range(slots)]

    def pending(self, slot: int) -> PendingTokens | None:
        """All tokens that were deferred, in order."""
        parts = self._pending[slot]
        return PendingTokens.join(parts) if parts else None

    def waiting(self, slot: int, length: int) -> list[Float[Tensor, "tokens d_model"]]:
        """Hidden states among the first `length` tokens that the block has yet to read."""
        parts = [part.hidden for part in self._pending[slot]]
        if self.lengths[slot] < length:
            parts.append(self._hidden[slot : slot + 1].clone())
        return parts

    def defer(self, slot: int, tokens: Sequence[int], hidden: Tensor) -> int:
        """Let the block read tokens later; returns how many parts are pending."""
        self._pending[slot].append(PendingTokens(tuple(tokens), hidden))
        return len(self._pending[slot])

    def advance(
        self,
        slots: Sequence[int],
        counts: Sequence[int],
        hidden: Float[Tensor, "slots d_model"],
    ) -> None:
        """The block has read so many more tokens, pending ones first; `hidden` is at the last."""
        self._hidden[list(slots)] = hidden
        for slot, count in zip(slots, counts, strict=True):
            self.lengths[slot] += count
            self._pending[slot] = []

    def advance_prompt(self, slot: int, length: int, hidden: Float[Tensor, " d_model"]) -> None:
        """The block has read a prompt of `length` tokens but for the last, where `hidden` is."""
        self.lengths[slot] = length - 1
        self._pending[slot] = []
        self._hidden[slot] = hidden

    def snapshot(self, slot: int, length: int) -> DraftSnapshot:
        """Keep what a slot holds, whose sequence has so many tokens."""
        pending = self.pending(slot)
        if pending is None:
            read = max(min(self.lengths[slot], length - 1), 0)
            return DraftSnapshot(read, self._hidden[slot].clone(), None)
        tokens, before = pending
        rest = PendingTokens(tokens[:-1], before[:-1]) if len(tokens) > 1 else None
        return DraftSnapshot(self.lengths[slot], before[-1], rest)

    def restore(self, slot: int, snapshot: DraftSnapshot) -> None:
        """Let a slot hold what a snapshot kept."""
        self.lengths[slot] = snapshot.length
        self._hidden[slot] = snapshot.hidden
        self._pending[slot] = [] if snapshot.pending is None else [snapshot.pending]

    def clear(self, slot: int) -> None:
        """Make a slot the beginning of a sequence."""
        self.lengths[slot] = 0
        self._pending[slot] = []
