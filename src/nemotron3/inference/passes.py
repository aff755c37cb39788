"""What an engine runs beside decoding steps: prompts, packed, and the draft block.

Decoding steps are `models/steps.py`'s. Those of the draft block are recorded and played as well,
and so are chunks of prompts that are no longer than a step: what stands behind a chat's last
message is, and most of its time would be Python.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron3.models.cache import HybridCache
from nemotron3.models.layout import Places, SequenceLayout
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.recordings import Recordings
from nemotron3.ops.segments import Segments


class Passes:
    """Passes of one model over one carried state."""

    def __init__(self, model: LanguageModel, cache: HybridCache) -> None:
        self.model = model
        self.cache = cache
        self._recordings = Recordings(cache)
        # On a GPU prompts are of too many shapes to capture each.
        self._plays_steps = self._recordings.are_possible and not self._recordings.take_padding

    def prefill(
        self,
        tokens: Sequence[Sequence[int]],
        slots: Sequence[int],
        *,
        is_prompt: bool = True,
        wanted: Sequence[int] | None = None,
    ) -> Float[Tensor, "tokens d_model"]:
        """Read prompts, or chunks of them; returns the hidden states, packed, or the `wanted` ones.

        What is no prompt was written here before, and is read as it was then: as steps.
        """
        layout = self.cache.layout([len(part) for part in tokens], slots, is_prompt=is_prompt)
        device = self.model.device
        at = None if wanted is None else torch.tensor(wanted, dtype=torch.int64, device=device)
        if self._plays_steps and self.cache.takes_steps(layout):
            hidden = self._read_step(tokens, layout)
            return hidden if at is None else hidden[at]
        x = self._embed(tokens)
        return self.model.backbone(x, layout, self.cache, wanted=at).hidden

    def read_drafts(
        self,
        tokens: Sequence[Sequence[int]],
        hidden: Float[Tensor, "tokens d_model"],
        slots: Sequence[int],
        context: Sequence[int],
    ) -> None:
        """Have the draft block read parts of prompts, behind `context` of its own tokens."""
        mtp = self.model.mtp
        assert mtp is not None
        layout = SequenceLayout(
            Segments([len(part) for part in tokens]), context=tuple(context), slots=tuple(slots)
        )
        mtp.read(self._embed(tokens), hidden, layout, self.cache.draft_layers)

    def draft(
        self,
        tokens: Sequence[Sequence[int]],
        hidden: Float[Tensor, "tokens d_model"],
        slots: Sequence[int],
        context: Sequence[int],
        last: Sequence[int],
    ) -> tuple[Float[Tensor, "sequences d_model"], Float[Tensor, "sequences vocab"]]:
        """A step of the draft block: its output and logits at token `last[i]` of sequence i.

        They are good until the next one.
        """
        mtp, rows, steps = self.model.mtp, len(tokens), len(tokens[0])
        assert mtp is not None

        def step(numbers: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
            ids, (at, slots_, context_) = numbers[: -3 * rows], numbers[-3 * rows :].view(3, rows)
            places = Places(slots_, context_)
            layout = SequenceLayout(Segments.uniform(rows, steps), places=places)
            x, states = self.model.embed(ids), self.cache.draft_layers
            picked, _ = mtp(x, hidden, layout, states, wanted=at)
            return picked, self.model.logits(picked)

        where = [row * steps + place for row, place in enumerate(last)]
        numbers = torch.tensor([*(t for part in tokens for t in part), *where, *slots, *context])
        numbers = numbers.to(self.model.device)
        if not self._recordings.are_possible:
            return step(numbers, hidden)

        def idle() -> tuple[Tensor, Tensor]:
            padding = torch.zeros_like(numbers)
            padding[-2 * rows : -rows] = -1  # no slots
            return padding, torch.zeros_like(hidden)

        picked, logits = self._recordings.run((rows, steps), (numbers, hidden), step, idle=idle)
        return picked, logits

    def forget(self) -> None:
        """Record the draft block's steps anew: the model's parameters are other tensors."""
        self._recordings.forget()

    def _read_step(self, tokens: Sequence[Sequence[int]], layout: SequenceLayout) -> Tensor:
        """Read chunks of a step's size. Its hidden states are good until the next one."""
        rows, segments = len(tokens), layout.segments

        def step(numbers: Tensor) -> tuple[Tensor]:
            ids, (slots, context) = numbers[: -2 * rows], numbers[-2 * rows :].view(2, rows)
            played = SequenceLayout(segments, places=Places(slots, context))
            return (self.model.hidden_states(ids, layout=played, state=self.cache),)

        self.cache.check(layout)
        stream = [token for part in tokens for token in part]
        numbers = torch.tensor([*stream, *layout.slots, *layout.context])
        shape = ("prompt", rows, segments.max_length)
        (hidden,) = self._recordings.run(shape, (numbers,), step)
        self.cache.advance(layout)
        return hidden

    def _embed(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        stream = [token for part in tokens for token in part]
        return self.model.embed(torch.tensor(stream, device=self.model.device))
