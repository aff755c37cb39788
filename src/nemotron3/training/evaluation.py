"""The loss on held-out text, for a look during training."""

import math
from collections.abc import Iterable

import torch

from nemotron3.errors import DataError
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.ops.cross_entropy import linear_cross_entropy
from nemotron3.training.losses import Targets


@torch.inference_mode()
def evaluate(
    model: LanguageModel, batches: Iterable[Targets], token_bytes: torch.Tensor
) -> dict[str, float]:
    """Mean loss in nats per token, accuracy, and bits per byte of the text.

    `token_bytes` [vocab] is the length in bytes of each token. Only targets that the mask counts
    enter both the bits and the bytes, so the first token of a sequence, which nothing predicts,
    is in neither.
    """
    nats = count = num_bytes = correct = 0.0
    for batch in batches:
        layout = SequenceLayout(batch.segments)
        hidden = model.backbone(model.embed(batch.tokens), layout).hidden
        scored = linear_cross_entropy(hidden, model.output_weight, batch.targets, batch.mask)
        nats += scored.total.item()
        count += batch.mask.sum().item()
        num_bytes += (token_bytes[batch.targets] * batch.mask).sum().item()
        correct += (scored.correct * batch.mask).sum().item()
    if not num_bytes:
        raise DataError(
            "no held-out token follows another one; give more text, or longer documents"
        )
    return {
        "eval/loss": nats / count,
        "eval/accuracy": correct / count,
        "eval/bits_per_byte": nats / math.log(2) / num_bytes,
    }
