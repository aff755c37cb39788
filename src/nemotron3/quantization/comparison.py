"""A quantized model beside the one that it was made of, on held-out tokens."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nemotron3.data import Batch
from nemotron3.errors import DataError
from nemotron3.models.cache.state_precision import StatePrecision
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.ops.segments import Segments

_SLICE = 512
"""Tokens whose logits exist at once: a vocabulary is large."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Means over the targets of held-out text."""

    num_tokens: int
    loss: float
    """Cross-entropy of the quantized model in nats per token."""
    original_loss: float
    """That of the model it was made of."""
    kl: float
    """KL divergence from the original's distribution to the quantized one's, in nats per token."""
    top1_agreement: float
    """How often both models' most probable token is the same."""


@torch.inference_mode()
def compare(
    model: LanguageModel,
    quantized: LanguageModel,
    batches: Iterable[Batch],
    *,
    state: StatePrecision | None = None,
) -> Comparison:
    """Read the batches with both models; raises DataError where nothing is predicted.

    With a `state` the quantized model attends to keys and values in its formats, as an engine does.
    """
    sums = torch.zeros(5, dtype=torch.float64)
    for batch in batches:
        moved = batch.to(model.device)
        hidden = [
            model.hidden_states(moved.tokens, layout=SequenceLayout(Segments(moved.lengths))),
            _hidden_states(quantized, moved, state),
        ]
        for first in range(0, len(moved.tokens), _SLICE):
            part = slice(first, first + _SLICE)
            logits = model.logits(hidden[0][part]), quantized.logits(hidden[1][part])
            mask = moved.loss_mask[part]
            sums += _sums(*logits, moved.targets[part], mask)
    count, original, own, kl, agreed = sums.tolist()
    if not count:
        raise DataError("no held-out token follows another one; give more text")
    return Comparison(
        num_tokens=int(count),
        loss=own / count,
        original_loss=original / count,
        kl=kl / count,
        top1_agreement=agreed / count,
    )


def _hidden_states(model: LanguageModel, batch: Batch, precision: StatePrecision | None) -> Tensor:
    if precision is None:
        layout = SequenceLayout(Segments(batch.lengths))
        return model.hidden_states(batch.tokens, layout=layout)
    state = model.new_state(len(batch.lengths), precision)
    layout = state.layout(batch.lengths, is_prompt=True)
    return model.hidden_states(batch.tokens, layout=layout, state=state)


def _sums(original: Tensor, own: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Number of targets, both losses, KL, and equal first choices, each summed."""
    p, q = F.log_softmax(original, -1), F.log_softmax(own, -1)
    at = targets.unsqueeze(-1)
    rows = [
        torch.ones_like(mask),
        -p.gather(-1, at).squeeze(-1),
        -q.gather(-1, at).squeeze(-1),
        (p.exp() * (p - q)).sum(-1),
        (p.argmax(-1) == q.argmax(-1)).float(),
    ]
    return torch.stack([(row * mask).double().sum() for row in rows]).cpu()
