"""What a model carries between calls: keys and values, convolution tails, state-space states.

One `HybridCache` serves a number of sequences, each in a slot of its own. A call says in its layout
which slots its sequences use and how much they hold already; each layer then reads and writes its
own part, and the model advances the lengths when the call is done.

    cache = model.new_state(slots=2)
    model(prompt, layout=cache.layout([7, 3]), state=cache)   # two prompts, packed
    model(tokens, layout=cache.layout([1, 1]), state=cache)   # one more token each
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemotron3.errors import ConfigError
from nemotron3.models.config import AttentionConfig, MambaConfig, ModelConfig
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.pattern import LayerKind
from nemotron3.ops.segments import Segments


class MambaState:
    """Convolution tails and state-space states of one Mamba layer, one row per slot."""

    def __init__(
        self, config: MambaConfig, slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.tails = torch.zeros(
            slots, config.conv_kernel - 1, config.conv_channels, dtype=dtype, device=device
        )
        # States accumulate over the whole sequence, so they are never kept below float32.
        self.states = torch.zeros(
            slots,
            config.mamba_num_heads,
            config.mamba_head_dim,
            config.ssm_state_size,
            dtype=torch.promote_types(dtype, torch.float32),
            device=device,
        )

    def read(self, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
        """Tails and states of the layout's sequences; to be read only."""
        if self._is_whole(layout) and not torch.is_grad_enabled():
            return self.tails, self.states
        rows = list(layout.slots)
        return self.tails[rows], self.states[rows]

    def write(self, layout: SequenceLayout, tails: Tensor, states: Tensor) -> None:
        """Keep the tails and states after the call."""
        if self._is_whole(layout):
            self.tails.copy_(tails.detach())
            self.states.copy_(states.detach())
            return
        rows = list(layout.slots)
        self.tails[rows] = tails.detach().to(self.tails.dtype)
        self.states[rows] = states.detach()

    def _is_whole(self, layout: SequenceLayout) -> bool:
        """Whether a layout has every slot in its place, so that nothing needs to be picked."""
        return layout.slots == tuple(range(len(self.tails)))


class AttentionState:
    """Keys and values of one attention layer, one row per slot, growing by doubling."""

    def __init__(
        self, config: AttentionConfig, slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (slots, 0, config.num_key_value_heads, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def extend(self, layout: SequenceLayout, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Remember the call's keys and values; returns all of each sequence, packed."""
        self._reserve(layout.keys.max_length)
        keys, values = (
            self._extend(buffer, layout, new) for buffer, new in ((self.keys, k), (self.values, v))
        )
        return keys, values

    def _extend(self, buffer: Tensor, layout: SequenceLayout, new: Tensor) -> Tensor:
        parts: list[Tensor] = []
        spans = zip(layout.slots, layout.context, new.split(layout.segments.lengths), strict=True)
        for slot, old, arriving in spans:
            buffer[slot, old : old + len(arriving)] = arriving.detach()
            parts += [buffer[slot, :old].to(new.dtype), arriving]
        return torch.cat(parts)

    def _reserve(self, length: int) -> None:
        have = self.keys.shape[1]
        if length > have:
            more = max(length, 2 * have) - have
            grow = (0, 0, 0, 0, 0, more)
            self.keys = torch.nn.functional.pad(self.keys, grow)
            self.values = torch.nn.functional.pad(self.values, grow)


LayerState = MambaState | AttentionState


class HybridCache:
    """The carried state of a whole model for a number of sequences.

    It carries values and no gradients: what an earlier call left behind is a constant to the next.
    """

    def __init__(
        self,
        config: ModelConfig,
        kinds: Sequence[LayerKind],
        *,
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.lengths = [0] * slots
        self.layers: list[LayerState | None] = []
        for kind in kinds:
            state: LayerState | None = None
            if kind is LayerKind.MAMBA:
                assert config.mamba is not None
                state = MambaState(config.mamba, slots, dtype, device)
            elif kind is LayerKind.ATTENTION:
                assert config.attention is not None
                state = AttentionState(config.attention, slots, dtype, device)
            self.layers.append(state)

    def layout(self, lengths: Sequence[int], slots: Sequence[int] | None = None) -> SequenceLayout:
        """The layout of a call that brings `lengths` new tokens to `slots` (all, where omitted)."""
        slots = tuple(range(len(self.lengths))) if slots is None else tuple(slots)
        return SequenceLayout(
            Segments(lengths), context=tuple(self.lengths[s] for s in slots), slots=slots
        )

    def check(self, layout: SequenceLayout) -> None:
        """Refuse a layout that does not continue what the slots hold."""
        if len(set(layout.slots)) < len(layout.segments):
            raise ConfigError(
                f"the layout has {len(layout.segments)} sequences in slots {layout.slots}; with a "
                "state each needs a slot of its own, as in layout=state.layout(lengths)"
            )
        held = tuple(self.lengths[slot] for slot in layout.slots)
        if layout.context != held:
            raise ConfigError(
                f"the layout continues sequences of {layout.context} tokens, but the state holds "
                f"{held}; make a new layout for each call with state.layout(lengths)"
            )

    def advance(self, layout: SequenceLayout) -> None:
        """Count the tokens of a finished call."""
        for slot, length in zip(layout.slots, layout.segments.lengths, strict=True):
            self.lengths[slot] += length
