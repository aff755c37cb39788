"""Experts are kept even: by a bias that only selects, and by a loss per sequence."""

import pytest
import torch

from nemotron3.models.experts import Routing
from nemotron3.ops.segments import Segments
from nemotron3.training.balancing import (
    expert_load,
    max_violation,
    sequence_balance_loss,
    update_selection_bias,
)
from tests.tiny import tiny_config, tiny_model
from tests.tolerances import FLOAT64


def routing_of(scores, choices=2, bias=0.0):
    indices = (scores.detach() + bias).topk(choices).indices
    return Routing(indices, scores.gather(1, indices), scores)


def test_the_bias_moves_towards_even_load_by_its_rate():
    router = tiny_model("E").routers[0]
    router.e_score_correction_bias.zero_()
    update_selection_bias(router, torch.tensor([0.0, 8, 4, 4, 4, 4, 4, 4]), 0.25)
    assert router.e_score_correction_bias.tolist() == [0.25, -0.25, 0, 0, 0, 0, 0, 0]
    update_selection_bias(router, torch.tensor([4.0] * 8), 0.25)
    assert router.e_score_correction_bias.tolist() == [0.25, -0.25, 0, 0, 0, 0, 0, 0]


def test_the_bias_selects_and_never_weighs():
    router = tiny_model("E").routers[0]
    router.e_score_correction_bias.zero_()
    x = torch.randn(20, 64)
    before = router(x)
    router.e_score_correction_bias += 100.0  # the same for all: no other choice
    after = router(x)
    assert torch.equal(after.indices.sort().values, before.indices.sort().values)
    assert torch.equal(after.scores, before.scores)
    order, wanted = after.indices.argsort(), before.indices.argsort()
    torch.testing.assert_close(after.weights.gather(1, order), before.weights.gather(1, wanted))

    router.e_score_correction_bias[3] += 100.0
    forced = router(x)
    assert (forced.indices == 3).any(1).all()
    chosen = forced.scores.gather(1, forced.indices)
    weights = 2.5 * chosen / chosen.sum(1, keepdim=True)
    torch.testing.assert_close(forced.weights, weights)
    forced.weights.sum().backward()
    assert router.e_score_correction_bias.grad is None


def test_the_updates_even_out_a_skewed_router():
    """All tokens prefer two of eight experts; after some hundred batches the load is near even."""
    config = tiny_config("E", hidden_size=16)
    router = tiny_model(config).routers[0]
    router.e_score_correction_bias.zero_()
    favour = torch.tensor([4.0, 3, 0, 0, 0, 0, 0, 0]) @ router.weight  # towards two experts
    generator = torch.Generator().manual_seed(0)
    violations = []
    for _ in range(600):
        x = torch.randn(256, 16, generator=generator) + favour
        with torch.no_grad():
            load = expert_load(router(x))
        violations.append(max_violation(load))
        update_selection_bias(router, load, 2e-3)
    assert violations[0] > 1.0  # of 8 / 3 - 1 at most
    assert sum(violations[-20:]) / 20 < 0.25


def test_load_counts_choices_and_its_violation_is_the_excess_of_the_busiest():
    routing = Routing(torch.tensor([[0, 1], [0, 2], [0, 1]]), torch.ones(3, 2), torch.rand(3, 4))
    load = expert_load(routing)
    assert load.tolist() == [3, 2, 1, 0]
    assert max_violation(load) == pytest.approx(1.0)
    assert max_violation(torch.full((4,), 7.0)) == 0


def test_balance_loss_is_one_when_even_and_experts_over_choices_at_worst():
    even = torch.eye(4, dtype=torch.float64).repeat(3, 1)
    loss = sequence_balance_loss(routing_of(even, choices=1), Segments((12,))) / 12
    assert loss.item() == pytest.approx(1.0)
    same = torch.tensor([[1.0, 1.0, 0.0, 0.0]], dtype=torch.float64).repeat(12, 1)
    loss = sequence_balance_loss(routing_of(same, choices=2), Segments((12,))) / 12
    assert loss.item() == pytest.approx(4 / 2)


def test_balance_loss_of_a_packed_stream_is_the_sum_over_its_sequences(assert_close):
    lengths = (3, 1, 10, 6)
    scores = torch.rand(20, 8, dtype=torch.float64)
    packed = sequence_balance_loss(routing_of(scores), Segments(lengths))
    alone = [
        sequence_balance_loss(routing_of(part), Segments((len(part),)))
        for part in scores.split(lengths)
    ]
    assert_close(packed, torch.stack(alone).sum(), FLOAT64)
    joined = sequence_balance_loss(routing_of(scores), Segments((20,)))
    assert abs(joined - packed) > 0.1


def test_balance_loss_judges_by_choices_without_the_bias():
    scores = torch.rand(16, 8, dtype=torch.float64)
    plain = sequence_balance_loss(routing_of(scores), Segments((16,)))
    biased = routing_of(scores, bias=torch.linspace(5, -5, 8))
    assert sequence_balance_loss(biased, Segments((16,))) == plain
