"""The layout of a batch: where sequences begin in the packed stream, and their cached lengths.

Training on packed documents, prefill of many prompts, prefill in chunks, decoding and the
verification of drafts are the same forward pass with another layout. A layout is an argument,
never a global.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from nemotron3.errors import ConfigError
from nemotron3.ops.segments import Segments

MAX_STEPS = 16
"""Most new tokens of each sequence in a step, which updates states in place, token by token."""


class DeviceLayout(NamedTuple):
    """`slots` and `cached_lengths` of a layout as tensors, for kernels."""

    slots: Int[Tensor, " sequence"]
    cached_lengths: Int[Tensor, " sequence"]


@dataclass(frozen=True)
class SequenceLayout:
    """Sequences in a packed stream, and the number of tokens of each in the carried state."""

    segments: Segments
    """The tokens of this call."""
    cached_lengths: tuple[int, ...] = ()
    """Tokens of each sequence in the state before this call; empty without a state."""
    slots: tuple[int, ...] = ()
    """Slot of each sequence in the state; empty without a state."""
    is_verification: bool = False
    """Whether the call verifies drafts: the state does not change until `HybridCache.accept`."""
    is_prompt: bool = False
    """Whether the tokens are part of a prompt: a narrow state is then rounded once, after them."""
    prefixes: tuple[int, ...] = ()
    """The last `len(prefixes)` sequences of this call continue earlier ones of it, and these are
    the indices of those: a prompt with many answers is computed once. Not with a state."""
    device_layout: "DeviceLayout | None" = None
    """`slots` and `cached_lengths` as tensors. If given, they replace the tuples, and their values
    may differ in each replay of a recorded call."""

    def __post_init__(self) -> None:
        count = len(self.segments)
        for name, given in (("cached_lengths", self.cached_lengths), ("slots", self.slots)):
            if given and len(given) != count:
                raise ConfigError(
                    f"layout has {count} sequences but {len(given)} entries of {name}"
                )
        if self.prefixes and (self.slots or self.device_layout is not None):
            raise ConfigError("layout has prefixes and slots; sequences of a state have no prefix")
        last = count - len(self.prefixes) - 1
        if wrong := [prefix for prefix in self.prefixes if not 0 <= prefix <= last]:
            raise ConfigError(
                f"layout has prefix {wrong[0]} of {count} sequences, of which the last "
                f"{len(self.prefixes)} continue others; a prefix must be one from 0 to {last}"
            )

    @classmethod
    def of(cls, tokens: Tensor) -> "SequenceLayout":
        """The layout of an ordinary [batch, seq] tensor of tokens, without state."""
        batch, length = tokens.shape
        return cls(Segments.uniform(batch, length))

    @classmethod
    def packed(cls, lengths: tuple[int, ...] | list[int]) -> "SequenceLayout":
        """The layout of documents that are packed one after another, without state."""
        return cls(Segments(lengths))

    @cached_property
    def is_step(self) -> bool:
        """Whether every sequence continues a state by the same, small number of tokens."""
        length = self.segments.uniform_length
        has_state = bool(self.slots) or self.device_layout is not None
        return has_state and length is not None and length <= MAX_STEPS

    def slot_index(self, device: torch.device) -> Tensor:
        """`slots` as a tensor, int64 [sequences]."""
        return self._device_layout(device).slots

    def cached_lengths_tensor(self, device: torch.device) -> Tensor:
        """`cached_lengths` as a tensor, int64 [sequences]."""
        return self._device_layout(device).cached_lengths

    def _device_layout(self, device: torch.device) -> "DeviceLayout":
        if self.device_layout is not None:
            return self.device_layout
        if device not in self._made:
            self._made[device] = DeviceLayout(
                torch.tensor(self.slots, device=device),
                torch.tensor(self.cached_lengths, device=device),
            )
        return self._made[device]

    @cached_property
    def _made(self) -> dict[torch.device, "DeviceLayout"]:
        return {}

    @cached_property
    def keys(self) -> Segments:
        """The segments of keys in attention: the tokens in the state and those of this call."""
        if self.prefixes:
            lengths = self.segments.lengths
            pairs = zip(self._prefix_lengths, lengths, strict=True)
            return Segments(before + new for before, new in pairs)
        if not any(self.cached_lengths):
            return self.segments
        return Segments(
            old + new for old, new in zip(self.cached_lengths, self.segments.lengths, strict=True)
        )

    def positions(self, device: torch.device) -> Tensor:
        """Position of each token within its whole sequence, int64 [tokens]."""
        positions = self.segments.positions(device)
        if any(self.cached_lengths) or self.device_layout is not None:
            positions = positions + self.cached_lengths_tensor(device)[self.segments.ids(device)]
        if self.prefixes:
            before = torch.tensor(self._prefix_lengths, device=device)
            positions = positions + before[self.segments.ids(device)]
        return positions

    @cached_property
    def stages(self) -> tuple[Segments, Segments]:
        """The sequences that begin in this call, and those that continue one of them."""
        lengths, first = self.segments.lengths, len(self.segments) - len(self.prefixes)
        return Segments(lengths[:first]), Segments(lengths[first:])

    def prefix_index(self, device: torch.device) -> Tensor:
        """`prefixes` as a tensor, int64 [continuing sequences]."""
        return torch.tensor(self.prefixes, dtype=torch.int64, device=device)

    def key_index(self, device: torch.device) -> Tensor:
        """Index in the stream of each key of `keys`: those of a prefix come with every sequence
        that continues it, int64 [keys]."""
        if device not in self._key_indices:
            starts, ends = self.segments.starts, self.segments.starts[1:]
            own = [torch.arange(a, b) for a, b in zip(starts[:-1], ends, strict=True)]
            first = len(own) - len(self.prefixes)
            parts = own[:first]
            for prefix, tokens in zip(self.prefixes, own[first:], strict=True):
                parts += [own[prefix], tokens]
            self._key_indices[device] = torch.cat(parts).to(device)
        return self._key_indices[device]

    @cached_property
    def _key_indices(self) -> dict[torch.device, Tensor]:
        return {}

    @property
    def _prefix_lengths(self) -> list[int]:
        """Tokens of each sequence's prefix, 0 for those that begin in this call."""
        lengths, first = self.segments.lengths, len(self.segments) - len(self.prefixes)
        return [0] * first + [lengths[prefix] for prefix in self.prefixes]


def shift_left(values: Tensor, segments: Segments, by: int) -> tuple[Tensor, Tensor]:
    """The value `by` positions after each token in its own sequence, and a mask.

    After the end of a sequence the value is 0 and the mask False. It is Megatron's `roll_tensor`
    for multi-token prediction, which also stops at document boundaries.
    """
    positions = segments.positions(values.device)
    lengths = torch.tensor(segments.lengths, device=values.device)[segments.ids(values.device)]
    valid = positions + by < lengths
    shifted = torch.roll(values, -by, dims=0)
    return shifted.masked_fill(~valid, 0), valid
