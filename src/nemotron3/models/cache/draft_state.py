"""The progress of the multi-token-prediction block in each slot, and its pending inputs.

The inputs of the block at a position are the model's hidden state there and the next token. So the
hidden state of a prompt's last token is pending until the next token is chosen. Tokens that are
chosen while the engine does not draft are pending as well, and are processed later in one call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class PendingTokens(NamedTuple):
    """Tokens of a sequence that the block has not processed yet."""

    tokens: tuple[int, ...]
    hidden: Float[Tensor, "tokens d_model"]
    """The model's hidden state at the position before each of them."""

    @classmethod
    def join(cls, parts: "Sequence[PendingTokens]") -> "PendingTokens":
        """Join consecutive parts."""
        tokens = tuple(token for part in parts for token in part.tokens)
        return cls(tokens, torch.cat([part.hidden for part in parts]))


@dataclass(frozen=True)
class DraftSnapshot:
    """The `DraftState` of a slot at one moment.

    The last pending token is left out, because a continuation may have another token there.
    """

    length: int
    hidden: Tensor
    pending: PendingTokens | None

    @property
    def nbytes(self) -> int:
        """Memory of the pending hidden states."""
        return 0 if self.pending is None else self.pending.hidden.nbytes


class DraftState:
    """Lengths, hidden states and pending tokens of all slots."""

    def __init__(
        self, slots: int, hidden_size: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.lengths = [0] * slots
        """Tokens of each sequence that the block has processed. With the pending ones these are all
        tokens of a sequence that is decoding, and all but the last of a prompt."""
        self._hidden = torch.zeros(slots, hidden_size, dtype=dtype, device=device)
        """The model's hidden state at the last token of each prompt, which the block takes with the
        next token; of a decoding sequence, at the last token that the block has processed."""
        self._pending: list[list[PendingTokens]] = [[] for _ in range(slots)]

    def pending(self, slot: int) -> PendingTokens | None:
        """All tokens that were deferred, in order."""
        parts = self._pending[slot]
        return PendingTokens.join(parts) if parts else None

    def waiting(self, slot: int, length: int) -> list[Float[Tensor, "tokens d_model"]]:
        """Hidden states at the first `length` tokens that the block has not processed yet."""
        parts = [part.hidden for part in self._pending[slot]]
        if self.lengths[slot] < length:
            parts.append(self._hidden[slot : slot + 1].clone())
        return parts

    def defer(self, slot: int, tokens: Sequence[int], hidden: Tensor) -> int:
        """Add pending tokens; returns the number of pending parts."""
        self._pending[slot].append(PendingTokens(tuple(tokens), hidden))
        return len(self._pending[slot])

    def advance(
        self,
        slots: Sequence[int],
        counts: Sequence[int],
        hidden: Float[Tensor, "slots d_model"],
    ) -> None:
        """Add the tokens that the block has processed, and drop the pending ones. `hidden` is the
        model's hidden state at the last of them."""
        self._hidden[list(slots)] = hidden
        for slot, count in zip(slots, counts, strict=True):
            self.lengths[slot] += count
            self._pending[slot] = []

    def advance_prompt(self, slot: int, length: int, hidden: Float[Tensor, " d_model"]) -> None:
        """Record that the block has processed all but the last of a prompt's `length` tokens;
        `hidden` is the hidden state of the last."""
        self.lengths[slot] = length - 1
        self._pending[slot] = []
        self._hidden[slot] = hidden

    def snapshot(self, slot: int, length: int) -> DraftSnapshot:
        """Copy the state of a slot whose sequence has `length` tokens."""
        pending = self.pending(slot)
        if pending is None:
            read = max(min(self.lengths[slot], length - 1), 0)
            return DraftSnapshot(read, self._hidden[slot].clone(), None)
        tokens, before = pending
        rest = PendingTokens(tokens[:-1], before[:-1]) if len(tokens) > 1 else None
        return DraftSnapshot(self.lengths[slot], before[-1], rest)

    def restore(self, slot: int, snapshot: DraftSnapshot) -> None:
        """Put the state of a snapshot into a slot."""
        self.lengths[slot] = snapshot.length
        self._hidden[slot] = snapshot.hidden
        self._pending[slot] = [] if snapshot.pending is None else [snapshot.pending]

    def clear(self, slot: int) -> None:
        """Reset a slot to the state before a sequence."""
        self.lengths[slot] = 0
        self._pending[slot] = []
