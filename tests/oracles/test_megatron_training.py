"""Balance, selection bias and multi-token prediction against Megatron-core's own functions."""

import pytest
import torch
from torch.nn import functional as F

from nemotron3.models.experts import Routing
from nemotron3.models.layout import SequenceLayout, shift_left
from nemotron3.ops.segments import Segments
from nemotron3.training.balancing import sequence_balance_loss, update_selection_bias
from nemotron3.training.batch import TrainBatch
from tests.oracles import megatron
from tests.tiny import tiny_config, tiny_model, tokens_for
from tests.tolerances import FLOAT32, FLOAT64
from tests.training.batches import forward, pretraining


@pytest.mark.parametrize(("experts", "choices"), [(8, 3), (5, 1), (16, 16)])
def test_sequence_balance_loss_and_its_gradient(assert_close, experts, choices):
    batch, length = 4, 11
    logits = torch.randn(length, batch, experts, dtype=torch.float64, requires_grad=True)
    theirs = megatron.sequence_balance(logits, choices=choices, factor=1e-4)
    (their_gradient,) = torch.autograd.grad(theirs, logits)

    # Megatron's layout is [seq, batch], ours is one sequence after another.
    scores = logits.transpose(0, 1).reshape(-1, experts).sigmoid()
    biased = (scores + torch.randn(experts)).topk(choices).indices  # the bias must not matter
    routing = Routing(biased, scores.gather(1, biased), scores)
    segments = Segments.uniform(batch, length)
    ours = 1e-4 * sequence_balance_loss(routing, segments) / segments.total
    (our_gradient,) = torch.autograd.grad(ours, logits)
    assert_close(ours / 1e-4, theirs / 1e-4, FLOAT64)
    scale = their_gradient.abs().max().clamp_min(1e-12)  # all chosen: no gradient but rounding
    assert_close(our_gradient / scale, their_gradient / scale, FLOAT64 if choices < 16 else 1.0)


def test_update_of_the_selection_bias(monkeypatch):
    router = tiny_model("E").routers[0]
    load = torch.tensor([3.0, 9.0, 6.0, 6.0, 0.0, 12.0, 6.0, 6.0])
    wanted = megatron.updated_bias(router.e_score_correction_bias.clone(), load, 1e-3, monkeypatch)
    before = router.e_score_correction_bias.clone()
    update_selection_bias(router, load, 1e-3)
    assert torch.equal(router.e_score_correction_bias, wanted)
    assert (router.e_score_correction_bias != before).tolist() == (load != 6).tolist()


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
@pytest.mark.parametrize("lengths", [(7,), (1, 2, 9, 3, 1), (4, 4, 4)])
def test_targets_of_each_depth_are_rolled_within_documents(depth, lengths):
    total = sum(lengths)
    batch = TrainBatch(
        tokens=torch.randint(1, 97, (total,)),
        targets=torch.randint(1, 97, (total,)),
        mask=(torch.rand(total) > 0.3).float(),
        segments=Segments(lengths),
    )
    targets, mask, _ = batch.at_depth(depth)
    tokens, _ = shift_left(batch.tokens, batch.segments, depth)
    assert torch.equal(tokens, megatron.rolled(batch.tokens, lengths, depth))
    assert torch.equal(targets, megatron.rolled(batch.targets, lengths, depth))
    assert torch.equal(mask, megatron.rolled(batch.mask, lengths, depth))


@pytest.mark.parametrize("scaling", [0.3, 0.1])
def test_the_loss_of_all_depths_is_megatrons(assert_close, scaling):
    """CE + lambda / D * sum of masked means, with the labels and the mask rolled as Megatron does.

    Everything but the rolling is spelled out: heads, cross-entropy and means.
    """
    rows, length = 2, 13
    model = tiny_model(tiny_config("M*E/*E/*E"), dtype=torch.float64)
    tokens, labels = tokens_for(model.config, 2, rows, length)
    mask = (torch.rand(rows, length) > 0.2).float()
    layout = SequenceLayout.of(tokens)

    hidden = model.backbone(model.embed(tokens.flatten()), layout).hidden
    wanted = _masked_mean(model.logits(hidden), labels, mask)
    for depth in (1, 2):
        ids, shifted, kept = (
            megatron.rolled_rows(values, depth) for values in (tokens, labels, mask)
        )
        hidden, _ = model.mtp(model.embed(ids.flatten()), hidden, layout)
        wanted = wanted + scaling / 2 * _masked_mean(model.logits(hidden), shifted, kept)

    batch = TrainBatch(
        tokens=tokens.flatten(),
        targets=labels.flatten(),
        mask=mask.flatten(),
        segments=layout.segments,
    )
    objective = pretraining(model, mtp_loss_scaling=scaling, balance_loss=0.0)
    ours = forward(model, batch, objective)
    assert_close(ours.total.detach(), wanted.detach(), FLOAT32)  # the weights of tokens are float32


def _masked_mean(logits, labels, mask):
    losses = F.cross_entropy(logits, labels.flatten(), reduction="none")
    return (losses * mask.flatten()).sum() / mask.sum()
