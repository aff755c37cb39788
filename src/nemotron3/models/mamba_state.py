"""What a Mamba layer carries between calls: a convolution's tail and the scan's state."""

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron3.models.layout import SequenceLayout
from nemotron3.models.state import LayerState, Parts, StateMemory
from nemotron3.models.state_format import StateFormat
from nemotron3.ops.ssd import ssd_steps


class MambaState(LayerState):
    """Convolution tails and state-space states of one Mamba layer."""

    def __init__(
        self, memory: StateMemory, *, tail: tuple[int, int], state: tuple[int, int, int]
    ) -> None:
        """`tail` is [tap, channel] and `state` [head, head_dim, d_state] of one sequence."""
        # States accumulate over the whole sequence, so they are computed in float32 at least.
        wide = torch.promote_types(memory.dtype, torch.float32)
        self.format = StateFormat(memory.precision, memory.layer, wide)
        tails = torch.zeros(memory.slots, *tail, dtype=memory.dtype, device=memory.device)
        # Of narrow ones a last row is nobody's: there the padding of a call goes, slot -1.
        slots = memory.slots + self.format.is_narrow
        super().__init__(rows=(tails, *self.format.zeros(slots, *state, device=memory.device)))

    @property
    def tails(self) -> Tensor:
        """The last inputs of the convolution."""
        return self.rows[0]

    @property
    def states(self) -> Parts:
        """The scan's states, as `StateFormat` keeps them."""
        return self.rows[1:]

    def read(self, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
        """Tails and states of the layout's sequences."""
        slots = layout.slot_index(self.tails.device)
        return self.tails[slots], self._read_states(slots)

    def write(self, layout: SequenceLayout, tails: Tensor, states: Tensor) -> None:
        """Keep the tails and states after the call."""
        device = self.tails.device
        slots = layout.slot_index(device)
        lengths = torch.tensor(layout.segments.lengths, device=device)
        self.tails[slots] = tails.detach().to(self.tails.dtype)
        parts = self.format.keep(states.detach(), layout.context_lengths(device) + lengths)
        self._write_states(slots, parts)

    def takes_steps(self, layout: SequenceLayout) -> bool:
        """Whether a call goes on in place, token by token.

        A prompt is rounded where the call ends, however short it is, so that its neighbours in the
        call do not matter.
        """
        return layout.is_step and not (layout.is_prompt and self.format.is_narrow)

    def tail_trail(self, layout: SequenceLayout) -> Tensor | None:
        """Where a tentative call leaves the tails after each token; else None."""
        trails = self.trails_for(layout)
        return trails[0] if trails else None

    def scan(
        self,
        layout: SequenceLayout,
        operands: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    ) -> Float[Tensor, "tokens head head_dim"]:
        """Steps of the scan on `operands` x, dt, A, B, C and D, from the states, in place."""
        device = self.tails.device
        slots, trails = layout.slot_index(device), self.trails_for(layout)[1:]
        if not self.format.is_narrow:
            (states,), trail = self.states, trails[0] if trails else None
            return ssd_steps(*operands, states, slots, trail=trail)
        rows = len(layout.segments)
        x, dt, A, B, C, D = operands
        of_tokens = [t.unflatten(0, (rows, -1)) for t in (x, dt, B, C)]
        every = torch.arange(rows, device=device)
        positions = layout.context_lengths(device)
        states, kept, outputs = self._read_states(slots), (), []
        for t in range(layout.segments.max_length):
            x, dt, B, C = (tokens[:, t] for tokens in of_tokens)
            outputs.append(ssd_steps(x, dt, A, B, C, D, states, every))
            positions = positions + 1
            kept = self.format.keep(states, positions)
            for trail, part in zip(trails, kept, strict=bool(trails)):
                trail[:, t] = part
            states = self.format.widen(kept)
        if not trails:
            self._write_states(slots, kept)
        return torch.stack(outputs, dim=1).flatten(0, 1)

    def _read_states(self, slots: Tensor) -> Tensor:
        return self.format.widen(tuple(part[slots] for part in self.states))

    def _write_states(self, slots: Tensor, parts: Parts) -> None:
        for kept, part in zip(self.states, parts, strict=True):
            kept[slots] = part
