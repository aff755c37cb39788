"""The policy's loss: its gradient, its corrections, and that any packing gives the same."""

import itertools
from functools import partial

import pytest
import torch

from nemotron3.errors import ConfigError
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.nemotron_h import ModelOutput
from nemotron3.ops.segments import Segments
from nemotron3.rl.policy_objective import PolicyBatch, PolicyLossConfig, PolicyObjective
from tests.tiny import named_gradients, tiny_model
from tests.tolerances import FLOAT64

EXACT = PolicyLossConfig(correction="none", sequence_threshold=None)
LENGTHS = (5, 9, 1, 7)


def head_output(logits):
    """What a model would give whose output layer is the identity."""
    return ModelOutput(
        hidden=[logits],
        output_weight=torch.eye(logits.shape[-1], dtype=logits.dtype),
        routings=[],
        mtp_routings=[],
        residual_rms=[],
    )


def one_token(logits, actions, advantages, sampled=None):
    """A batch of sequences of one token each."""
    n = len(actions)
    logprobs = logits.detach().log_softmax(-1).gather(1, actions[:, None])[:, 0]
    return PolicyBatch(
        tokens=torch.zeros(n, dtype=torch.int64),
        targets=actions,
        mask=torch.ones(n),
        weights=advantages,
        sampled_logprobs=logprobs if sampled is None else sampled,
        segments=Segments([1] * n),
    )


def loss_of(config, logits, batch):
    objective = PolicyObjective(config)
    return objective.loss(head_output(logits), batch, objective.counts(batch))


def test_the_gradient_is_that_of_the_expected_reward_of_a_tabular_policy():
    """Over all actions by their probability, the surrogate's gradient is minus the true one."""
    rewards = torch.tensor([1.0, 0.0, 0.5, -0.25], dtype=torch.float64)
    table = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table.requires_grad_()
    (true,) = torch.autograd.grad((table.softmax(0) * rewards).sum(), table)
    expected = torch.zeros_like(true)
    baseline = (table.softmax(0) * rewards).sum().detach()
    for action in range(4):
        actions = torch.tensor([action])
        batch = one_token(table[None], actions, (rewards[action] - baseline)[None])
        (gradient,) = torch.autograd.grad(loss_of(EXACT, table[None], batch).total, table)
        expected -= table.softmax(0)[action].detach() * gradient
    assert torch.allclose(expected, true, atol=1e-12)


def test_importance_weights_make_the_gradient_of_an_older_policy_the_present_one():
    """Actions sampled by other weights, weighted by the ratio: the same expectation."""
    rewards = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    old, new = (torch.randn(3, dtype=torch.float64, generator=generator) for _ in range(2))
    new.requires_grad_()
    (true,) = torch.autograd.grad((new.softmax(0) * rewards).sum(), new)
    found = torch.zeros_like(true)
    for action in range(3):
        sampled = old.log_softmax(0)[action][None]
        batch = one_token(new[None], torch.tensor([action]), rewards[action][None], sampled)
        (gradient,) = torch.autograd.grad(loss_of(EXACT, new[None], batch).total, new)
        found -= old.softmax(0)[action] * gradient
    assert torch.allclose(found, true, atol=1e-12)


@pytest.mark.parametrize(
    ("correction", "weights"),
    [("none", [0.1, 1.0, 10.0]), ("clip", [0.5, 1.0, 5.0]), ("mask", [0.0, 1.0, 0.0])],
)
def test_weights_outside_of_the_bounds_are_clipped_or_masked(correction, weights):
    logits = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    actions, advantages = torch.tensor([0, 1, 2]), torch.ones(3, dtype=torch.float64)
    sampled = logits.detach().log_softmax(-1)[:, 0] - torch.tensor([0.1, 1.0, 10.0]).double().log()
    batch = one_token(logits, actions, advantages, sampled)
    config = PolicyLossConfig(correction=correction, sequence_threshold=None)
    terms = loss_of(config, logits, batch)
    (gradient,) = torch.autograd.grad(terms.total, logits)
    for row, (action, weight) in enumerate(zip(actions.tolist(), weights, strict=True)):
        # -w (1 - p) / 3 at the action that was sampled
        assert gradient[row, action].item() == pytest.approx(-weight * 0.75 / 3)
    kept = sum(weight > 0 for weight in weights) / 3
    assert terms.metrics["policy/kept"].item() == pytest.approx(kept)


def test_a_sequence_whose_log_probabilities_are_off_is_left_out():
    logits = torch.zeros(5, 4, dtype=torch.float64, requires_grad=True)
    exact = logits.detach().log_softmax(-1)[:, 0]
    batch = PolicyBatch(
        tokens=torch.zeros(5, dtype=torch.int64),
        targets=torch.zeros(5, dtype=torch.int64),
        mask=torch.ones(5),
        weights=torch.ones(5, dtype=torch.float64),
        sampled_logprobs=exact - torch.tensor([0.0, 0.1, 0.9, 0.0, 1.5]).double(),
        segments=Segments([2, 3]),
    )
    config = PolicyLossConfig(correction="none", sequence_threshold=1.5)
    (gradient,) = torch.autograd.grad(loss_of(config, logits, batch).total, logits)
    assert gradient[:2].any(dim=1).all()
    assert not gradient[2:].any()


def test_the_pull_to_a_reference_is_k3_and_its_gradient_is_right():
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    actions = torch.tensor([0, 3, 1])
    reference = torch.randn(3, 4, dtype=torch.float64).log_softmax(-1)
    chosen = reference.gather(1, actions[:, None])[:, 0]
    batch = one_token(logits, actions, torch.zeros(3, dtype=torch.float64))
    batch = PolicyBatch(**(vars(batch) | {"reference_logprobs": chosen}))
    config = PolicyLossConfig(correction="none", sequence_threshold=None, kl=0.1)
    terms = loss_of(config, logits, batch)
    x = chosen - logits.log_softmax(-1).gather(1, actions[:, None])[:, 0]
    expected = 0.1 * (x.exp() - 1 - x).mean()
    assert terms.total.item() == pytest.approx(expected.item())
    (ours,) = torch.autograd.grad(terms.total, logits, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected, logits)
    assert torch.allclose(ours, theirs, atol=1e-12)


def rollouts(seed=0):
    """Sequences with prompts, advantages and noise between engine and training."""
    generator = torch.Generator().manual_seed(seed)
    for length in LENGTHS:
        yield {
            "tokens": torch.randint(1, 97, (length + 1,), generator=generator),
            "mask": (torch.rand(length, generator=generator) > 0.4).float(),
            "weights": torch.randn(length, generator=generator),
            "noise": 0.1 * torch.randn(length, generator=generator),
        }


def packed(parts):
    return PolicyBatch(
        tokens=torch.cat([part["tokens"][:-1] for part in parts]),
        targets=torch.cat([part["tokens"][1:] for part in parts]),
        mask=torch.cat([part["mask"] for part in parts]),
        weights=torch.cat([part["weights"] for part in parts]).double(),
        sampled_logprobs=torch.cat([-4.5 + part["noise"] for part in parts]).double(),
        segments=Segments([len(part["mask"]) for part in parts]),
    )


@pytest.mark.parametrize(
    "config",
    [EXACT, PolicyLossConfig(lowest=0.1, highest=9.0), PolicyLossConfig(mtp_loss_scaling=0.3)],
)
def test_any_split_into_microbatches_gives_the_same_loss_and_gradients(config, assert_close):
    model = tiny_model("ME*-/*E/*E", dtype=torch.float64)
    objective, parts = PolicyObjective(config, num_mtp_depths=2), list(rollouts())
    results = []
    for cut in ([parts], [parts[:1], parts[1:]], [[part] for part in reversed(parts)]):
        batches = [packed(piece) for piece in cut]
        each = [objective.counts(batch) for batch in batches]
        counts = {name: sum(found[name] for found in each) for name in each[0]}
        model.zero_grad()
        total, metrics = 0.0, {}
        for batch in batches:
            terms = model(
                batch.tokens,
                layout=SequenceLayout(batch.segments),
                head=partial(objective.loss, batch=batch, counts=counts),
                mtp_depths=objective.mtp_depths,
                detach_mtp=objective.detach_mtp,
            )
            terms.total.backward()
            total += terms.total.item()
            for name, value in terms.metrics.items():
                metrics[name] = metrics.get(name, 0.0) + value.item()
        results.append((total, metrics, named_gradients(model)))
    for total, metrics, gradients in results[1:]:
        assert total == pytest.approx(results[0][0], abs=1e-10)
        assert metrics == pytest.approx(results[0][1], abs=1e-6)
        for name, gradient in gradients.items():
            assert_close(gradient, results[0][2][name], FLOAT64)


def test_the_depths_train_the_mtp_block_and_nothing_else(assert_close):
    """Towards what was sampled, by the plain cross-entropy, whatever the advantages."""
    model = tiny_model("ME*-/*E/*E", dtype=torch.float64)
    batch, found = packed(list(rollouts())), []
    for scaling in (0.0, 0.3, 0.6):
        objective = PolicyObjective(PolicyLossConfig(mtp_loss_scaling=scaling), num_mtp_depths=2)
        model.zero_grad()
        terms = model(
            batch.tokens,
            layout=SequenceLayout(batch.segments),
            head=partial(objective.loss, batch=batch, counts=objective.counts(batch)),
            mtp_depths=objective.mtp_depths,
            detach_mtp=True,
        )
        terms.total.backward()
        found.append((terms.metrics, named_gradients(model)))
    (_, without), (metrics, once), (_, twice) = found
    assert {name for name in once if name.startswith("mtp.")}
    for name, gradient in once.items():
        if name.startswith("mtp."):
            assert_close(2 * gradient, twice[name], FLOAT64)
        else:
            assert_close(gradient, without[name], FLOAT64)
    # The metric is the mean over the sampled tokens that a depth can predict.
    targets, mask, _ = batch.at_depth(1)
    hidden = model(
        batch.tokens,
        layout=SequenceLayout(batch.segments),
        head=lambda output: output.hidden[1],
        mtp_depths=1,
    )
    scores = (hidden @ model.output_weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert metrics["train/loss_mtp_1"].item() == pytest.approx(
        (-(scores * mask).sum() / mask.sum()).item(), abs=1e-6
    )
    with pytest.raises(ConfigError, match="has no MTP block"):
        PolicyObjective(PolicyLossConfig(mtp_loss_scaling=0.3))


def test_without_sampled_tokens_there_is_no_gradient():
    logits = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    batch = one_token(logits, torch.tensor([0, 1]), torch.ones(2, dtype=torch.float64))
    batch = PolicyBatch(**(vars(batch) | {"mask": torch.zeros(2)}))
    terms = loss_of(PolicyLossConfig(), logits, batch)
    (gradient,) = torch.autograd.grad(terms.total, logits, allow_unused=True)
    assert gradient is None or not gradient.any()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"correction": "cut"}, "correction is 'cut'"),
        ({"lowest": 1.5}, "bounded by 1.5 and 5.0"),
        ({"highest": 0.9}, "bounded by 0.5 and 0.9"),
        ({"sequence_threshold": 1.0}, "sequence_threshold is 1.0"),
        ({"kl": -1.0}, "kl is -1.0"),
    ],
)
def test_settings_are_checked(fields, said):
    with pytest.raises(ConfigError, match=said):
        PolicyLossConfig(**fields)


def test_every_bound_keeps_equal_log_probabilities_as_they_are():
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    actions, advantages = torch.tensor([0, 1, 2, 3]), torch.randn(4, dtype=torch.float64)
    batch = one_token(logits, actions, advantages)
    found = []
    for correction, threshold in itertools.product(("clip", "mask", "none"), (2.0, None)):
        config = PolicyLossConfig(correction=correction, sequence_threshold=threshold)
        (gradient,) = torch.autograd.grad(loss_of(config, logits, batch).total, logits)
        found.append(gradient)
    assert all(torch.equal(gradient, found[0]) for gradient in found)
