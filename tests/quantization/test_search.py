"""Sensitivities, and the search for formats under a budget."""

from itertools import product

import pytest
import torch

from nemotron3.errors import ConfigError
from nemotron3.models.parameter import quantizable_names
from nemotron3.quantization import compare, quantized_model, total_bits
from nemotron3.quantization.search import expected_kl, frontier_of_experts, search
from nemotron3.quantization.sensitivity import Sensitivity, fisher_diagonal, sensitivities
from tests.quantization.test_quantization import CONFIG, batch_of
from tests.tiny import tiny_config, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model(CONFIG)


@pytest.fixture(scope="module")
def fisher(model):
    batches = [batch_of(CONFIG, 24, seed=seed) for seed in range(6)]
    return fisher_diagonal(model, batches)


def test_fisher_is_the_mean_square_of_gradients(model, fisher):
    name = "backbone.layers.0.mixer.in_proj.weight"
    total = 0
    for seed in range(6):
        batch = batch_of(CONFIG, 24, seed=seed)
        logits = model(batch.tokens.view(1, -1))[0]
        loss = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="sum")
        [gradient] = torch.autograd.grad(loss, model.get_parameter(name))
        total = total + gradient.square()
    assert torch.allclose(fisher[name], total / (6 * 24), rtol=1e-3, atol=1e-9)
    assert fisher.keys() == {n for n in quantizable_names(model) if n.startswith("backbone.")}
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_experts_that_nobody_chooses_cost_nothing():
    model = tiny_model(tiny_config("ME", moe={"moe_intermediate_size": 112}))
    model.routers[0].e_score_correction_bias[3] = -100.0
    fisher = fisher_diagonal(model, [batch_of(model.config, 20)])
    found = sensitivities(model, fisher)
    experts = next(each for each in found if each.expert_kl)
    assert experts.matrices == tuple(
        f"backbone.layers.1.mixer.experts.{which}_proj" for which in ("up", "down")
    )
    assert experts.expert_kl[3] == 0
    assert sum(value > 0 for value in experts.expert_kl) > 3
    assert experts.kl == pytest.approx(sum(experts.expert_kl))


def test_more_bits_move_the_model_less(model, fisher):
    found = sensitivities(model, fisher)
    by_matrix = {}
    for each in found:
        by_matrix.setdefault(each.matrices, {})[each.format] = each
    for formats in by_matrix.values():
        assert formats["fp8"].kl < formats["nvfp4"].kl
        assert formats["nvfp4"].bits < formats["fp8"].bits


def test_the_budget_is_kept_and_no_single_exchange_is_better(model, fisher):
    found = sensitivities(model, fisher)
    _, frontier = search(model, found, 32)
    fewest = frontier[-1].bits_per_element
    assert [p.bits_per_element for p in frontier] == sorted(
        (p.bits_per_element for p in frontier), reverse=True
    )
    for budget in (32.0, 24.0, 18.0, fewest + 1e-6):
        formats, _ = search(model, found, budget)
        assert total_bits(quantized_model(model, formats))[0] <= budget
        assert (not formats) == (budget == 32.0)
    with pytest.raises(
        ConfigError, match=f"fewest bits per element of this model are {fewest:.3f}"
    ):
        search(model, found, fewest - 0.01)


def test_it_is_the_best_of_all_mixes_where_a_budget_is_met_exactly(model):
    """Against every mix of three matrices."""
    names = [n for n in quantizable_names(model) if n.startswith("backbone.")][:3]
    sizes = [model.get_parameter(name).numel() for name in names]
    found = [
        Sensitivity(matrices=(name,), format=kind, bits=bits * size, kl=kl, expert_kl=())
        for name, size, kls in zip(names, sizes, ((5, 1), (2, 1.9), (9, 0.1)), strict=True)
        for kind, bits, kl in (("nvfp4", 5, kls[0]), ("fp8", 8, kls[1]))
    ]
    kl_of = {(each.matrices[0], each.format): (each.bits, each.kl) for each in found}
    plain = {name: (32 * size, 0.0) for name, size in zip(names, sizes, strict=True)}
    elements = sum(p.numel() for p in model.parameters())
    rest = 32 * (elements - sum(sizes))
    mixes = [
        [kl_of.get((name, kind), plain[name]) for name, kind in zip(names, kinds, strict=True)]
        for kinds in product(("nvfp4", "fp8", None), repeat=3)
    ]
    _, frontier = search(model, found, 32)
    for point in frontier:
        budget = point.bits_per_element * elements + 1e-3
        possible = [
            sum(kl for _, kl in mix) for mix in mixes if rest + sum(b for b, _ in mix) <= budget
        ]
        assert point.kl == pytest.approx(min(possible))


def test_a_searched_mix_moves_the_model_less_than_the_same_bits_at_random(model, fisher):
    found = sensitivities(model, fisher)
    batches = [batch_of(CONFIG, 40, seed=seed) for seed in range(20, 24)]
    formats, _ = search(model, found, 22.0)
    best = compare(model, quantized_model(model, formats), batches).kl
    worst, _ = search(model, [_turned(each, found) for each in found], 22.0)
    assert best < compare(model, quantized_model(model, worst), batches).kl


def _turned(each, found):
    """The same matrix with the opposite price: what is sensitive looks as if it were not."""
    largest = max(other.kl / other.bits for other in found)
    turned = each.bits * (1.01 * largest - each.kl / each.bits)
    return Sensitivity(
        matrices=each.matrices, format=each.format, bits=each.bits, kl=turned, expert_kl=()
    )


def test_single_experts_reach_as_far_and_never_worse_where_both_have_a_point(model, fisher):
    found = sensitivities(model, fisher)
    _, together = search(model, found, 32)
    apart = frontier_of_experts(model, found)
    experts = sum(len(each.expert_kl) for each in found)
    assert len(together) < len(apart) <= len(together) + experts
    assert apart[-1].bits_per_element == pytest.approx(together[-1].bits_per_element)
    assert apart[-1].kl == pytest.approx(together[-1].kl)
    for point in together:
        # The path is optimal at its points; between them it is above by less than a step.
        below = next(p for p in apart if p.bits_per_element <= point.bits_per_element + 1e-9)
        above = [p for p in apart if p.bits_per_element >= point.bits_per_element - 1e-9][-1]
        share = 0.0
        if above.bits_per_element > below.bits_per_element:
            share = (point.bits_per_element - below.bits_per_element) / (
                above.bits_per_element - below.bits_per_element
            )
        assert below.kl + share * (above.kl - below.kl) <= point.kl + 1e-12
    assert expected_kl(together, 32) == 0
    assert expected_kl(together, together[3].bits_per_element) == together[3].kl


def test_an_expert_that_costs_nothing_is_rounded_first():
    """Beside experts that cost much, whose layer would stay as it is."""
    model = tiny_model(tiny_config("ME", moe={"moe_intermediate_size": 112}))
    names = tuple(f"backbone.layers.1.mixer.experts.{which}_proj" for which in ("up", "down"))
    size = sum(model.get_parameter(name).numel() for name in names)
    kls = (0.0, *[1.0] * 7)
    found = [Sensitivity(matrices=names, format="fp8", bits=8 * size, kl=sum(kls), expert_kl=kls)]
    _, together = search(model, found, 32)
    apart = frontier_of_experts(model, found)
    assert [p.kl for p in together] == [0, 7]
    assert [p.kl for p in apart] == [0, *range(8)]
