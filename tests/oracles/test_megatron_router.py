"""Megatron-core's router and shift, the code that the published models were trained with."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron3.models.config import MoEConfig
from nemotron3.models.experts import Router
from nemotron3.models.layout import shift_left
from nemotron3.ops.segments import Segments
from tests.tolerances import FLOAT32

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns of the GPU packages that it does without
    pytest.importorskip("megatron.core")
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
    from megatron.core.transformer.multi_token_prediction import roll_tensor

EXAMPLES = settings(max_examples=40, derandomize=True, deadline=None)


def router_for(seed: int, *, experts: int, choices: int, scale: float, normed: bool) -> Router:
    config = MoEConfig(
        n_routed_experts=experts,
        num_experts_per_tok=choices,
        moe_intermediate_size=8,
        routed_scaling_factor=scale,
        norm_topk_prob=normed,
    )
    router = Router(config, 16)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        router.weight.normal_(generator=generator)
        router.e_score_correction_bias.normal_(0, 0.2, generator=generator)
    return router


def dense(indices: torch.Tensor, weights: torch.Tensor, experts: int) -> torch.Tensor:
    return torch.zeros(len(indices), experts).scatter(1, indices, weights)


@EXAMPLES
@given(
    seed=st.integers(0, 999),
    experts=st.integers(2, 40),
    share=st.floats(0, 1),
    scale=st.sampled_from([1.0, 2.5, 5.0]),
)
def test_choices_and_weights_are_megatrons(seed, experts, share, scale):
    choices = 1 + int(share * (experts - 1))
    # Megatron does not normalise a single choice; Hugging Face's norm_topk_prob can say that.
    router = router_for(seed, experts=experts, choices=choices, scale=scale, normed=choices > 1)
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(seed))
    routing = router(x)
    probabilities, chosen = topk_routing_with_score_function(
        x @ router.weight.T,
        choices,
        scaling_factor=scale,
        score_function="sigmoid",
        expert_bias=router.e_score_correction_bias,
    )
    assert torch.equal(dense(routing.indices, torch.ones(50, choices), experts).bool(), chosen)
    assert (dense(routing.indices, routing.weights, experts) - probabilities).abs().max() < FLOAT32


def test_gradients_of_the_weights_are_megatrons(assert_close):
    router = router_for(0, experts=12, choices=4, scale=2.5, normed=True)
    x = torch.randn(30, 16)
    functional = torch.randn(30, 12)
    routing = router(x)
    (dense(routing.indices, routing.weights, 12) * functional).sum().backward()
    gradient, router.weight.grad = router.weight.grad, None
    probabilities, _ = topk_routing_with_score_function(
        x @ router.weight.T,
        4,
        scaling_factor=2.5,
        score_function="sigmoid",
        expert_bias=router.e_score_correction_bias,
    )
    (probabilities * functional).sum().backward()
    assert_close(gradient, router.weight.grad, FLOAT32)


@EXAMPLES
@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5), depth=st.integers(1, 4))
def test_shifting_is_megatrons_roll_once_per_depth(lengths, depth):
    segments = Segments(lengths)
    tokens = torch.arange(1, segments.total + 1)
    packed = PackedSeqParams(cu_seqlens_q=torch.tensor(segments.starts))
    rolled = tokens[None]
    mask = torch.ones_like(rolled)
    for _ in range(depth):
        rolled, _ = roll_tensor(rolled, shifts=-1, dims=-1, packed_seq_params=packed)
        mask, _ = roll_tensor(mask, shifts=-1, dims=-1, packed_seq_params=packed)
    shifted, valid = shift_left(tokens, segments, depth)
    assert torch.equal(shifted, rolled[0])
    assert torch.equal(valid, mask[0].bool())


def test_shifting_a_single_sequence_is_megatrons_plain_roll():
    tokens = torch.arange(1, 12)
    rolled, _ = roll_tensor(tokens[None].clone(), shifts=-1, dims=-1)
    assert torch.equal(shift_left(tokens, Segments([11]), 1)[0], rolled[0])
