"""Documents, packed into microbatches in any way."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemotron3.models.layout import SequenceLayout
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.ops.segments import Segments
from nemotron3.training.batch import TrainBatch
from nemotron3.training.objective import LossTerms, Objective
from nemotron3.training.pretrain_objective import PretrainLossConfig, PretrainObjective
from tests.tiny import named_gradients


def documents(*lengths: int, vocabulary: int = 97, seed: int = 0) -> list[Tensor]:
    """Random documents of so many inputs (and one token more, the last target)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocabulary, (n + 1,), generator=generator) for n in lengths]


def pack(
    parts: Sequence[Tensor], mask: Tensor | None = None, weights: Tensor | None = None
) -> TrainBatch:
    """Documents end to end, every target counted unless `mask` says otherwise."""
    tokens = torch.cat([part[:-1] for part in parts])
    return TrainBatch(
        tokens=tokens,
        targets=torch.cat([part[1:] for part in parts]),
        mask=torch.ones(len(tokens)) if mask is None else mask,
        weights=weights,
        segments=Segments(len(part) - 1 for part in parts),
    )


def pretraining(model: LanguageModel, **config: float) -> PretrainObjective:
    """The pre-training objective for this model."""
    depths = model.config.pattern.num_mtp_depths
    return PretrainObjective(PretrainLossConfig(**config), num_mtp_depths=depths)


def forward(
    model: LanguageModel,
    batch: TrainBatch,
    objective: Objective[TrainBatch],
    counts: dict[str, float] | None = None,
    *,
    recompute: bool = False,
) -> LossTerms:
    """The terms of one microbatch; by itself unless there are `counts`."""
    counts = objective.counts(batch) if counts is None else counts
    return model(
        batch.tokens,
        layout=SequenceLayout(batch.segments),
        head=lambda output: objective.loss(output, batch, counts),
        mtp_depths=objective.mtp_depths,
        recompute=recompute,
        routes=batch.routes,
    )


def accumulate(
    model: LanguageModel,
    microbatches: Sequence[TrainBatch],
    objective: Objective[TrainBatch] | None = None,
    *,
    recompute: bool = False,
) -> tuple[list[LossTerms], dict[str, Tensor]]:
    """The terms of each microbatch, and the gradients of all together."""
    objective = objective or pretraining(model)
    each = [objective.counts(batch) for batch in microbatches]
    counts = {name: sum(counts[name] for counts in each) for name in each[0]}
    model.zero_grad()
    terms = [forward(model, m, objective, counts, recompute=recompute) for m in microbatches]
    for term in terms:
        term.total.backward()
    return terms, named_gradients(model)


def assert_same(assert_close, actual, expected, tolerance):
    """Equal losses, metrics and gradients of two `accumulate`, gradients by their scale."""
    (terms, gradients), (wanted_terms, wanted_gradients) = actual, expected
    assert_close(_total(terms), _total(wanted_terms), tolerance)
    metrics, wanted_metrics = _sums(terms), _sums(wanted_terms)
    assert metrics.keys() == wanted_metrics.keys()
    for name, value in metrics.items():
        assert_close(value, wanted_metrics[name], max(tolerance, 1e-6))
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        scale = wanted_gradients[name].abs().max()
        if scale == 0:
            assert not gradient.any(), f"{name} has a gradient"
        else:
            assert_close(gradient / scale, wanted_gradients[name] / scale, tolerance)


def _total(terms):
    return sum(term.total.detach() for term in terms)


def _sums(terms):
    return {name: sum(term.metrics[name] for term in terms) for name in terms[0].metrics}
