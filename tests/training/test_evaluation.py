"""Held-out loss: over tokens, over bytes, and the same for any batches."""

import math

import pytest
import torch
from torch.nn import functional as F

from nemotron3.errors import DataError
from nemotron3.models.layout import SequenceLayout
from nemotron3.training.evaluation import evaluate
from tests.tiny import tiny_model
from tests.training.batches import documents, pack

BYTES = torch.arange(97) % 5  # some tokens are no text


def test_nats_per_token_and_bits_per_byte_of_what_is_counted():
    model = tiny_model()
    parts = documents(9, 1, 14)
    mask = (torch.rand(24) > 0.4).float()
    batch = pack(parts, mask)
    found = evaluate(model, [batch], BYTES)

    with torch.no_grad():
        logits = model(batch.tokens, layout=SequenceLayout.packed([9, 1, 14]))
    losses = F.cross_entropy(logits, batch.targets, reduction="none")
    right = (logits.argmax(-1) == batch.targets).float()
    num_bytes = (BYTES[batch.targets] * mask).sum()
    assert found == {
        "eval/loss": pytest.approx(((losses * mask).sum() / mask.sum()).item(), rel=1e-5),
        "eval/accuracy": pytest.approx(((right * mask).sum() / mask.sum()).item()),
        "eval/bits_per_byte": pytest.approx(
            ((losses * mask).sum() / math.log(2) / num_bytes).item(), rel=1e-5
        ),
    }


def test_batches_of_any_size_give_the_same():
    model = tiny_model()
    parts = documents(9, 3, 14, 5)
    whole = evaluate(model, [pack(parts)], BYTES)
    pieces = evaluate(model, [pack([part]) for part in parts], BYTES)
    assert pieces == {name: pytest.approx(value, rel=1e-5) for name, value in whole.items()}


def test_evaluation_leaves_no_gradients_and_no_grad_mode_behind():
    model = tiny_model()
    evaluate(model, [pack(documents(5))], BYTES)
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())


def test_text_with_nothing_to_predict_is_refused():
    with pytest.raises(DataError, match="no held-out token"):
        evaluate(tiny_model(), [pack(documents(5), torch.zeros(5))], BYTES)
