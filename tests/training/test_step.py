"""One update: the changes, and that nothing changes if the gradient is not finite."""

import copy
from dataclasses import dataclass, fields

import pytest
import torch

from nemotron3.errors import ConfigError, DivergenceError
from nemotron3.training.batch import TrainBatch
from nemotron3.training.objective import LossTerms
from nemotron3.training.optimizers import AdamWConfig, build_optimizer
from nemotron3.training.step import TrainingStep, router_names
from tests.tiny import tiny_config, tiny_model
from tests.tolerances import FLOAT32
from tests.training.batches import documents, pack, pretraining

PATTERN = "ME*-E/*E/*E"


def update(model, microbatches, *, lr=1e-3, clip=1.0, measure=False, objective=None, **options):
    optimizer = build_optimizer(model, AdamWConfig(lr=1.0))
    objective = objective or pretraining(model)
    step = TrainingStep(model, optimizer, objective, clip_grad_norm=clip, **options)
    return step(microbatches, learning_rate=lr, measure=measure), optimizer


def test_microbatches_give_the_update_and_the_metrics_of_the_whole_batch(assert_close):
    parts = documents(9, 4, 17, 1, 6, 2)
    one, many = tiny_model(PATTERN), tiny_model(PATTERN)
    # After one AdamW step a gradient of rounding size would move a weight as far as any other;
    # so gradients are compared.
    wanted, _ = update(one, [pack(parts)], lr=0.0, measure=True)
    found, _ = update(many, [pack([part]) for part in parts], lr=0.0, measure=True)
    assert found.keys() == wanted.keys()
    residual = {name for name in found if name.startswith("model/")}  # a mean over microbatches
    assert len(residual) == 5
    for name in found.keys() - residual:
        assert found[name] == pytest.approx(wanted[name], rel=1e-4), name
    for (name, p), q in zip(many.named_parameters(), one.parameters(), strict=True):
        assert p.grad is not None, name
        assert_close(p.grad, q.grad, FLOAT32)
    for router, other in zip(many.routers, one.routers, strict=True):
        assert torch.equal(router.e_score_correction_bias, other.e_score_correction_bias)


def test_biases_move_once_per_global_batch_by_the_rate():
    model = tiny_model(PATTERN)
    before = [router.e_score_correction_bias.clone() for router in model.routers]
    update(model, [pack([part]) for part in documents(30, 31, 33)], bias_update_rate=0.125)
    assert len(model.routers) == 3
    for router, old in zip(model.routers, before, strict=True):
        moved = (router.e_score_correction_bias - old).abs()
        assert moved.max() == pytest.approx(0.125)
        assert all(m == 0 or m == pytest.approx(0.125) for m in moved.tolist())


def test_metrics_say_everything_and_name_every_router():
    model = tiny_model(PATTERN)
    metrics, _ = update(model, [pack(documents(20))], lr=3e-4, measure=True)
    assert router_names(model) == ["layer_01", "layer_04", "mtp_layer_01"]
    assert set(metrics) == {
        "train/loss",
        "train/loss_mtp_1",
        "train/loss_mtp_2",
        "train/accuracy",
        "train/mtp_accuracy_1",
        "train/mtp_accuracy_2",
        "train/aux_loss",
        "moe/max_vio",
        "moe/max_vio_layer_01",
        "moe/max_vio_layer_04",
        "moe/max_vio_mtp_layer_01",
        "optim/lr",
        "optim/grad_norm",
        *(f"model/residual_norm_layer_{n:02d}" for n in range(5)),
    }
    assert metrics["optim/lr"] == 3e-4
    assert metrics["moe/max_vio"] == max(
        metrics[f"moe/max_vio_{name}"] for name in router_names(model)
    )


def test_a_model_without_experts_or_further_heads_has_fewer_metrics():
    metrics, _ = update(tiny_model("M*"), [pack(documents(20))])
    assert set(metrics) == {
        "train/loss",
        "train/accuracy",
        "train/aux_loss",
        "optim/lr",
        "optim/grad_norm",
    }
    assert metrics["train/aux_loss"] == 0


def test_the_residual_norm_is_that_of_the_stream_after_each_block():
    model = tiny_model(PATTERN)
    batch = pack(documents(12))
    seen = []
    hooks = [
        layer.register_forward_hook(
            lambda _, __, output: seen.append(output[0].square().mean().sqrt().item())
        )
        for layer in model.backbone.layers
    ]
    metrics, _ = update(model, [batch], measure=True)
    for hook in hooks:
        hook.remove()
    for index, value in enumerate(seen):
        assert metrics[f"model/residual_norm_layer_{index:02d}"] == pytest.approx(value)


def test_clipping_scales_the_update_and_the_metric_keeps_the_norm():
    free, clipped = tiny_model(PATTERN), tiny_model(PATTERN)
    wanted, _ = update(free, [pack(documents(12))], clip=None)
    found, _ = update(clipped, [pack(documents(12))], clip=0.01)
    assert found["optim/grad_norm"] == wanted["optim/grad_norm"] > 0.01
    norm = torch.stack([p.grad.norm() for p in clipped.parameters()]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("clip", [1.0, None])
def test_a_gradient_that_is_no_number_leaves_everything_as_it_was(bad, clip):
    model = tiny_model(PATTERN)
    optimizer = build_optimizer(model, AdamWConfig(lr=1e-3))
    with torch.no_grad():
        model.backbone.layers[2].mixer.o_proj.weight[0, 0] = bad
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        DivergenceError, match=r"gradient norm is (nan|inf) and the loss .*optimizer"
    ):
        TrainingStep(model, optimizer, pretraining(model), clip_grad_norm=clip)(
            [pack(documents(12)), pack(documents(5))], learning_rate=1e-3
        )
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(7.0), before[name].nan_to_num(7.0)), name
    assert not optimizer.state


def test_a_norm_that_overflows_is_no_number_either():
    model = tiny_model(PATTERN)
    before = copy.deepcopy(model.state_dict())
    objective = pretraining(model, mtp_loss_scaling=1e37)
    with pytest.raises(DivergenceError, match="gradient norm is inf"):
        update(model, [pack(documents(12))], objective=objective, clip=None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("lr", [0.0, 1e-4, 3e-3])
def test_the_update_has_the_rate_it_was_given(lr):
    """AdamW's first step is the rate times the gradient's sign; the optimizer was built with 1."""
    model = tiny_model(PATTERN)
    before = model.backbone.norm_f.weight.detach().clone()
    update(model, [pack(documents(30))], lr=lr)
    moved = (model.backbone.norm_f.weight - before).abs()
    assert moved.median().item() == pytest.approx(lr, rel=1e-2)


def test_a_pattern_of_each_kind_trains_every_parameter():
    config = tiny_config(PATTERN)
    model = tiny_model(config)
    update(model, [pack(documents(60, 70))])
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_a_step_without_microbatches_is_refused():
    with pytest.raises(ConfigError, match="needs a microbatch or more"):
        update(tiny_model("M"), [])


def test_a_block_that_the_objective_leaves_out_keeps_its_weights_and_biases():
    model = tiny_model(PATTERN)
    before = copy.deepcopy(model.mtp.state_dict())
    metrics, _ = update(
        model, [pack(documents(30))], objective=pretraining(model, mtp_loss_scaling=0.0)
    )
    assert all(torch.equal(t, before[name]) for name, t in model.mtp.state_dict().items())
    assert "moe/max_vio_layer_04" in metrics
    assert "moe/max_vio_mtp_layer_01" not in metrics


@dataclass(frozen=True, kw_only=True)
class ScoredBatch(TrainBatch):
    """A batch with another field, for the other objective."""

    bonus: float


class HiddenNorm:
    """The mean square of hidden states: an objective without targets, counts or the package."""

    mtp_depths = 0
    detach_mtp = False

    def counts(self, batch):
        return {"sequences": float(len(batch.segments))}

    def loss(self, output, batch, counts):
        total = output.hidden[0].square().mean() * batch.bonus / counts["sequences"]
        return LossTerms(total, {})


def test_any_objective_and_any_batch_will_do():
    model = tiny_model(PATTERN)
    plain = pack(documents(12, 5))
    batch = ScoredBatch(**{f.name: getattr(plain, f.name) for f in fields(plain)}, bonus=3.0)
    before = model.backbone.norm_f.weight.detach().clone()
    head = model.output_weight.detach().clone()
    metrics, _ = update(model, [batch], objective=HiddenNorm())
    assert metrics["optim/grad_norm"] > 0
    assert not any(name.startswith("train/") for name in metrics)
    assert not torch.equal(model.backbone.norm_f.weight, before)
    assert torch.equal(model.output_weight, head)


def test_the_forward_pass_is_the_models_own_call():
    model = tiny_model(PATTERN)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    update(model, [pack([part]) for part in documents(4, 5, 6)])
    assert len(calls) == 3
