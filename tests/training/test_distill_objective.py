"""The loss of a distillation."""

import pytest
import torch

from nemotron3.models.layout import SequenceLayout
from nemotron3.ops.segments import Segments
from nemotron3.training.distill_objective import DistillBatch, DistillObjective
from nemotron3.training.optimizers import SGDConfig, build_optimizer
from nemotron3.training.step import TrainingStep
from tests.tiny import tiny_model, tokens_for


def batch_of(teacher, tokens, mask, lengths):
    segments = Segments(lengths)
    with torch.no_grad():
        hidden = teacher.hidden_states(tokens, layout=SequenceLayout(segments))
    return DistillBatch(
        tokens=tokens, targets=tokens, mask=mask, segments=segments, teacher_hidden=hidden
    )


def test_it_is_the_mean_divergence_over_the_whole_batch_and_trains_no_mtp_block():
    teacher, student = tiny_model("ME*/*E"), tiny_model("ME*/*E", seed=1)
    tokens, mask = tokens_for(teacher.config, 14), torch.ones(14)
    mask[[3, 8]] = 0.0
    parts = [
        batch_of(teacher, tokens[:9], mask[:9], (4, 5)),
        batch_of(teacher, tokens[9:], mask[9:], (5,)),
    ]
    logits = [
        torch.cat([m(part.view(1, -1))[0] for part in (tokens[:4], tokens[4:9], tokens[9:])])
        for m in (teacher, student)
    ]
    p, q = (each.detach().log_softmax(-1) for each in logits)
    expected = ((p.exp() * (p - q)).sum(-1) * mask).sum() / mask.sum()
    agreement = ((p.argmax(-1) == q.argmax(-1)).float() * mask).sum() / mask.sum()
    step = TrainingStep(
        student,
        build_optimizer(student, SGDConfig(lr=1e-3)),
        DistillObjective(teacher.output_weight),
        clip_grad_norm=None,
        bias_update_rate=0.0,
    )
    found = step(parts, learning_rate=1e-3)
    assert found["train/loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert found["train/agreement"] == pytest.approx(agreement.item())
    assert step(parts, learning_rate=1e-3)["train/loss"] < found["train/loss"]
    assert all(p.grad is None for name, p in student.named_parameters() if name[:4] == "mtp.")
    assert all(p.grad is None for p in teacher.parameters())
