"""Microbatches of rollouts: with prompts that are computed once, the same update."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron3.models.routes import RecordedRoutes
from nemotron3.rl.batches import policy_batches
from nemotron3.rl.policy_objective import PolicyLossConfig, PolicyObjective
from nemotron3.rl.rollouts import Rollout
from nemotron3.training.optimizers import AdamWConfig, build_optimizer
from nemotron3.training.step import TrainingStep
from tests.tiny import named_gradients, tiny_model

VOCABULARY = 97


def rollout(prompt, answer, *, routes=None, turn=None):
    """With `turn`, the answer is followed by what a tool says and a second answer."""
    said = list(answer) if turn is None else [*answer, *turn, *answer]
    sampled = [True] * len(answer)
    if turn is not None:
        sampled += [False] * len(turn) + [True] * len(answer)
    ids = [*prompt, *said]
    return Rollout(
        row={},
        group=0,
        ids=ids,
        is_sampled=[False] * len(prompt) + sampled,
        logprobs=[0.0] * len(prompt) + [-0.5 - i / 7 for i in range(len(said))],
        weight_versions=[i % 2 for i in range(len(ids))],
        routes=routes,
    )


ids = st.integers(0, VOCABULARY - 1)
GROUPS = st.lists(
    st.tuples(
        st.lists(ids, min_size=1, max_size=6),
        st.lists(st.lists(ids, min_size=1, max_size=5), min_size=1, max_size=5),
    ),
    min_size=1,
    max_size=4,
)


def contexts(batch):
    """What stands before each sampled target, with what belongs to the target."""
    starts, tokens, found = batch.segments.starts, batch.tokens.tolist(), []
    first = len(batch.segments) - len(batch.prefixes)
    prefixes = [[]] * first + [tokens[starts[p] : starts[p + 1]] for p in batch.prefixes]
    for row, before in enumerate(prefixes):
        for place in range(starts[row], starts[row + 1]):
            if batch.mask[place]:
                numbers = (batch.weights, batch.sampled_logprobs, batch.current)
                context = (*before, *tokens[starts[row] : place + 1])
                target = batch.targets[place].item()
                found.append((context, target, *(each[place].item() for each in numbers)))
    return found


@given(groups=GROUPS, capacity=st.integers(11, 40))
def test_every_sampled_token_is_trained_once_after_all_that_stood_before_it(groups, capacity):
    rollouts = [rollout(prompt, answer) for prompt, answers in groups for answer in answers]
    advantages = [index - 1.5 for index in range(len(rollouts))]
    whole, shared = (
        policy_batches(rollouts, advantages, max_tokens=capacity, shares_prompts=shares, version=1)
        for shares in (False, True)
    )
    assert not any(batch.prefixes for batch in whole)
    assert all(batch.segments.total <= capacity for batch in shared)
    expected = sorted(each for batch in whole for each in contexts(batch))
    assert sorted(each for batch in shared for each in contexts(batch)) == expected
    assert sum(b.segments.total for b in shared) <= sum(b.segments.total for b in whole)


def test_a_prompt_is_computed_once_for_all_rollouts_that_fit():
    rollouts = [rollout(range(10), [i, i]) for i in range(5)]
    (batch,) = policy_batches(rollouts, [1.0] * 5, max_tokens=100, shares_prompts=True)
    assert batch.segments.lengths == (9, *[2] * 5)
    assert batch.prefixes == (0,) * 5
    halves = policy_batches(rollouts, [1.0] * 5, max_tokens=9 + 3 * 2, shares_prompts=True)
    assert [half.segments.lengths for half in halves] == [(9, 2, 2, 2), (9, 2, 2)]
    (lone,) = policy_batches(rollouts[:1], [1.0], max_tokens=100, shares_prompts=True)
    assert (lone.segments.lengths, lone.prefixes) == ((11,), ())


def test_prompts_that_the_engine_read_with_other_experts_are_not_shared():
    """New weights came between: each is trained with the experts that it was played with."""
    routes = [torch.full((11, 1, 2), fill, dtype=torch.uint8) for fill in (0, 0, 1)]
    rollouts = [rollout(range(10), [i, i], routes=each) for i, each in enumerate(routes)]
    (batch,) = policy_batches(rollouts, [1.0] * 3, max_tokens=100, shares_prompts=True)
    assert batch.segments.lengths == (9, 11, 2, 2)
    assert batch.prefixes == (0, 0)
    (chosen,) = batch.routes.backbone
    assert chosen[:, 0].tolist() == [0] * 9 + [1] * 11 + [0] * 4


@pytest.mark.parametrize("has_routes", [False, True])
def test_an_update_is_the_same_with_prompts_computed_once(assert_close, has_routes):
    model = tiny_model("MEM*-E", dtype=torch.float64).float()
    torch.manual_seed(0)

    def routes(length):
        # The choices of a prompt are those of its group.
        fixed = torch.stack([torch.arange(length) % 2 + 2 * i for i in range(3)], -1)
        return fixed.unsqueeze(1).expand(-1, 2, -1) if has_routes else None

    prompts = [range(3, 20), [5], [1, 2, 3]]
    rollouts = [
        rollout(
            prompt,
            [place, 7, 9][: 1 + place % 3],
            turn=[4, 4] if place == 2 else None,
        )
        for prompt in prompts
        for place in range(4)
    ]
    rollouts = [replace(each, routes=routes(len(each.ids) - 1)) for each in rollouts]
    found = {}
    for shares in (False, True):
        batches = policy_batches(
            rollouts,
            [1.0, -0.5, 0.25, -2.0] * 3,
            max_tokens=60,
            shares_prompts=shares,
            version=0,
        )
        assert any(batch.prefixes for batch in batches) == shares
        step = TrainingStep(
            model,
            build_optimizer(model, AdamWConfig(lr=0.1, weight_decay=0.0)),
            PolicyObjective(PolicyLossConfig(correction="none", sequence_threshold=None)),
            clip_grad_norm=None,
            bias_update_rate=0.0,
        )
        metrics = step(batches, learning_rate=0.0)
        found[shares] = named_gradients(model), metrics
    for name, gradient in found[False][0].items():
        assert_close(found[True][0][name], gradient, 1e-5)
    for name, value in found[False][1].items():
        if not name.startswith("moe/"):  # their loads count the tokens that were computed
            assert found[True][1][name] == pytest.approx(value, rel=1e-5), name
    assert isinstance(batches[0].routes, RecordedRoutes) == has_routes
