"""The carried state of a Mamba layer: its convolution state and its SSM state."""

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron3.models.cache.state import LayerState, Parts, StateMemory
from nemotron3.models.cache.state_format import StateFormat
from nemotron3.models.layout import SequenceLayout
from nemotron3.ops.ssd import ssd_steps


class MambaState(LayerState):
    """Convolution and SSM states of one Mamba layer."""

    def __init__(
        self, memory: StateMemory, *, conv_shape: tuple[int, int], ssm_shape: tuple[int, int, int]
    ) -> None:
        """Shapes of one sequence's states: [tap, channel] and [head, head_dim, d_state]."""
        # States accumulate over the whole sequence, so they are computed in float32 at least.
        wide = torch.promote_types(memory.dtype, torch.float32)
        self.format = StateFormat(memory.precision, memory.layer, wide)
        conv_states = torch.zeros(
            memory.slots, *conv_shape, dtype=memory.dtype, device=memory.device
        )
        # Narrow states are written by index, so padding, with slot -1, needs a last row.
        slots = memory.slots + self.format.is_narrow
        ssm_states = self.format.zeros(slots, *ssm_shape, device=memory.device)
        super().__init__(rows=(conv_states, *ssm_states))

    @property
    def conv_states(self) -> Tensor:
        """The last inputs of the convolution."""
        return self.rows[0]

    @property
    def ssm_states(self) -> Parts:
        """The SSM states, as `StateFormat` stores them."""
        return self.rows[1:]

    def read(self, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
        """Convolution and SSM states of the layout's sequences."""
        slots = layout.slot_index(self.conv_states.device)
        return self.conv_states[slots], self._read_states(slots)

    def write(self, layout: SequenceLayout, conv_states: Tensor, ssm_states: Tensor) -> None:
        """Store the convolution and SSM states after a call."""
        device = self.conv_states.device
        slots = layout.slot_index(device)
        lengths = torch.tensor(layout.segments.lengths, device=device)
        self.conv_states[slots] = conv_states.detach().to(self.conv_states.dtype)
        parts = self.format.quantize(
            ssm_states.detach(), layout.cached_lengths_tensor(device) + lengths
        )
        self._write_states(slots, parts)

    def takes_steps(self, layout: SequenceLayout) -> bool:
        """Whether a call updates the state in place, token by token.

        Narrow states of a prompt are rounded at the end of the call, even if the prompt is short,
        so that the rounding does not depend on other sequences in the call.
        """
        return layout.is_step and not (layout.is_prompt and self.format.is_narrow)

    def conv_intermediate_states(self, layout: SequenceLayout) -> Tensor | None:
        """Memory for the convolution states after each token of a verification call; else None."""
        intermediate_states = self.intermediate_states_for(layout)
        return intermediate_states[0] if intermediate_states else None

    def scan(
        self,
        layout: SequenceLayout,
        operands: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    ) -> Float[Tensor, "tokens head head_dim"]:
        """Advance the SSM states in place, token by token, by the operands x, dt, A, B, C and D."""
        device = self.conv_states.device
        slots, intermediate_states = (
            layout.slot_index(device),
            self.intermediate_states_for(layout)[1:],
        )
        if not self.format.is_narrow:
            (ssm_states,), intermediate = (
                self.ssm_states,
                intermediate_states[0] if intermediate_states else None,
            )
            return ssd_steps(*operands, ssm_states, slots, intermediate_states=intermediate)
        rows = len(layout.segments)
        x, dt, A, B, C, D = operands
        of_tokens = [t.unflatten(0, (rows, -1)) for t in (x, dt, B, C)]
        every = torch.arange(rows, device=device)
        positions = layout.cached_lengths_tensor(device)
        ssm_states, kept, outputs = self._read_states(slots), (), []
        for t in range(layout.segments.max_length):
            x, dt, B, C = (tokens[:, t] for tokens in of_tokens)
            outputs.append(ssd_steps(x, dt, A, B, C, D, ssm_states, every))
            positions = positions + 1
            kept = self.format.quantize(ssm_states, positions)
            for intermediate, part in zip(
                intermediate_states, kept, strict=bool(intermediate_states)
            ):
                intermediate[:, t] = part
            ssm_states = self.format.dequantize(kept)
        if not intermediate_states:
            self._write_states(slots, kept)
        return torch.stack(outputs, dim=1).flatten(0, 1)

    def _read_states(self, slots: Tensor) -> Tensor:
        return self.format.dequantize(tuple(part[slots] for part in self.ssm_states))

    def _write_states(self, slots: Tensor, parts: Parts) -> None:
        for kept, part in zip(self.ssm_states, parts, strict=True):
            kept[slots] = part
