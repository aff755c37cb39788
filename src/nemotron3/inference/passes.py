"""What an engine runs beside decoding steps: prompts, packed, and the draft block.

Decoding steps are `models/steps.py`'s, who repeats them without deciding anything anew.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron3.models.cache import HybridCache
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.ops.segments import Segments


class Passes:
    """Passes of one model over one carried state."""

    def __init__(self, model: LanguageModel, cache: HybridCache) -> None:
        self.model = model
        self.cache = cache

    def prefill(
        self, tokens: Sequence[Sequence[int]], slots: Sequence[int]
    ) -> tuple[Float[Tensor, "tokens d_model"], SequenceLayout]:
        """Read prompts, or chunks of them; returns the hidden states, packed."""
        layout = self.cache.layout([len(part) for part in tokens], slots)
        return self.model.backbone(self._embed(tokens), layout, self.cache).hidden, layout

    def draft(
        self,
        tokens: Sequence[Sequence[int]],
        hidden: Float[Tensor, "tokens d_model"],
        slots: Sequence[int],
        context: Sequence[int],
    ) -> Float[Tensor, "tokens d_model"]:
        """The draft block, behind `context` of its own tokens in each slot."""
        mtp = self.model.mtp
        assert mtp is not None
        layout = SequenceLayout(
            Segments([len(part) for part in tokens]), context=tuple(context), slots=tuple(slots)
        )
        return mtp(self._embed(tokens), hidden, layout, self.cache.draft_layers)[0]

    def _embed(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        stream = [token for part in tokens for token in part]
        return self.model.embed(torch.tensor(stream, device=self.model.device))
