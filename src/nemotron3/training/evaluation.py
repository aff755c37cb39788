"""The loss on held-out text, evaluated during training."""

import math
from collections.abc import Callable, Iterable

import torch

from nemotron3.errors import DataError
from nemotron3.models.nemotron_h import LanguageModel, ModelOutput
from nemotron3.ops.cross_entropy import TokenLosses, linear_cross_entropy
from nemotron3.training.batch import TrainBatch


@torch.inference_mode()
def evaluate(
    model: LanguageModel,
    batches: Iterable[TrainBatch],
    token_bytes: torch.Tensor,
    *,
    on_losses: Callable[[torch.Tensor], None] = lambda _: None,
) -> dict[str, float]:
    """Mean loss in nats per token, accuracy, and bits per byte of the text.

    `token_bytes` [vocab] is the length in bytes of each token. Only targets whose mask is 1 count,
    in both the bits and the bytes. The first token of a sequence is never a target, so it counts in
    neither. `on_losses` is given the loss of every target of each batch,
    [tokens], in nats.
    """
    nats = count = num_bytes = correct = 0.0
    for batch in batches:

        def head(output: ModelOutput, batch: TrainBatch = batch) -> TokenLosses:
            hidden = output.hidden[0]
            return linear_cross_entropy(hidden, output.output_weight, batch.targets, batch.mask)

        scored = model(batch.tokens, layout=batch.layout, head=head)
        on_losses(scored.per_token)
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
