"""Documents, packed into microbatches in any way."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.ops.segments import Segments
from nemotron3.training.losses import LossConfig, LossTerms, Targets, loss_terms
from tests.tiny import named_gradients


def documents(*lengths: int, vocabulary: int = 97, seed: int = 0) -> list[Tensor]:
    """Random documents of so many inputs (and one token more, the last target)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocabulary, (n + 1,), generator=generator) for n in lengths]


def pack(parts: Sequence[Tensor], mask: Tensor | None = None) -> Targets:
    """Documents end to end, every target counted unless `mask` says otherwise."""
    tokens = torch.cat([part[:-1] for part in parts])
    return Targets(
        tokens=tokens,
        targets=torch.cat([part[1:] for part in parts]),
        mask=torch.ones(len(tokens)) if mask is None else mask,
        segments=Segments(len(part) - 1 for part in parts),
    )


def accumulate(
    model: LanguageModel,
    microbatches: Sequence[Targets],
    config: LossConfig | None = None,
    *,
    recompute: bool = False,
) -> tuple[list[LossTerms], dict[str, Tensor]]:
    """The terms of each microbatch, and the gradients of all together."""
    depths = model.config.pattern.num_mtp_depths
    counts = [sum(c) for c in zip(*(m.counts(depths) for m in microbatches), strict=True)]
    total = sum(m.segments.total for m in microbatches)
    model.zero_grad()
    terms = [
        loss_terms(
            model, m, counts, config or LossConfig(), total_tokens=total, recompute=recompute
        )
        for m in microbatches
    ]
    for term in terms:
        term.total.backward()
    return terms, named_gradients(model)
