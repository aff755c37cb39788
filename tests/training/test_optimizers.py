import math

import pytest
import torch
from torch import nn

from nemotron3.checkpoint import CheckpointStore
from nemotron3.config import from_record, to_record
from nemotron3.errors import CheckpointError, ConfigError
from nemotron3.models.initial_values import Constant, Normal
from nemotron3.models.linear import Embedding, Linear
from nemotron3.models.mamba2 import CausalConv1d
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.norm import RMSNorm
from nemotron3.models.parameter import DeclaredModule, parameter_specs
from nemotron3.ops.segments import Segments
from nemotron3.training.optimizers import (
    AdamWConfig,
    OptimizerConfig,
    SGDConfig,
    build_optimizer,
    clip_gradients,
    load_optimizer_tensors,
    optimizer_tensors,
    parameter_groups,
    set_learning_rate,
)
from tests.tiny import qwen_config, tiny_config, tiny_model


class Block(DeclaredModule):
    """One of each kind of parameter that a hybrid model has."""

    def __init__(self):
        super().__init__()
        self.embeddings = Embedding(7, 4)
        self.norm = RMSNorm(4, 1e-5)
        self.conv1d = CausalConv1d(4, 3)
        self.in_proj = Linear(4, 6)
        self.declare("experts", (2, 4, 6), init=Normal(), decays=True)
        self.declare("A_log", (2, 3), init=Constant(0.0), decays=False, keep_float32=True)
        self.declare("D", (3,), init=Constant(1.0), decays=False)
        self.declare("dt_bias", (1, 3), init=Constant(0.0), decays=False)
        self.frozen = nn.Parameter(torch.ones(3, 3), requires_grad=False)
        self.unused = Linear(2, 2)
        self.lm_head = Linear(4, 7)
        self.lm_head.weight = self.embeddings.weight

    def forward(self, tokens):
        hidden = self.norm(self.embeddings(tokens))
        hidden, _ = self.conv1d(hidden, Segments([len(hidden)]), None)
        mixed = self.in_proj(hidden) * self.D.sum() + self.A_log.sum()
        expert = torch.einsum("td,edf->tf", hidden, self.experts) + self.dt_bias.sum()
        return self.lm_head((mixed * expert)[:, :4])


def seeded_model(seed: int = 0) -> Block:
    model = Block()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


CONFIG = AdamWConfig(lr=1e-2)


def train(model, optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        tokens = torch.randint(7, (9,), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(tokens[:-1])[: 8 - 2], tokens[3:])
        loss.backward()
        clip_gradients(model.parameters(), CONFIG.clip_grad_norm)
        set_learning_rate(optimizer, CONFIG.lr / (1 + step))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def test_every_trainable_parameter_is_in_exactly_one_group():
    model = Block()
    groups = parameter_groups(model, 0.1)
    held = [id(p) for group in groups for p in group["params"]]
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(held) == len(set(held))
    assert set(held) == trainable


def test_only_matrices_decay():
    model = Block()
    decayed, plain = parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    assert {names[id(p)] for p in decayed["params"]} == {
        "embeddings.weight",
        "conv1d.weight",
        "in_proj.weight",
        "experts",
        "unused.weight",
    }


def test_in_a_whole_model_matrices_decay_and_nothing_else():
    """And the convolution's kernel, which is one of each channel."""
    model = tiny_model("MEM*E-/*E")
    decayed, plain = parameter_groups(model, 0.1)
    of = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices = (
        *("embeddings", "lm_head", "eh_proj", "gate", "in_proj", "conv1d", "out_proj"),
        *("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
        *("fc1_latent_proj", "fc2_latent_proj"),
    )
    for parameter in decayed["params"]:
        name = of[id(parameter)]
        assert name.removesuffix(".weight").rpartition(".")[2] in matrices, name
        assert parameter.ndim > 1
    for parameter in plain["params"]:
        name = of[id(parameter)]
        is_dynamics = name.rpartition(".")[2] in ("A_log", "D", "dt_bias")
        assert "norm" in name or is_dynamics or name.endswith("conv1d.bias"), name


@pytest.mark.parametrize(
    "config", [tiny_config("MEM*E-/*E"), qwen_config()], ids=["hybrid", "qwen"]
)
def test_every_parameter_of_a_model_is_declared(config):
    model = LanguageModel.from_config(config)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    assert parameter_specs(model).keys() == parameters.keys() | buffers.keys()


def test_a_parameter_that_nobody_declares_is_refused():
    model = Block()
    model.unused = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"'unused\.weight'; make it by DeclaredModule\.declare"):
        parameter_groups(model, 0.1)
    model.unused.requires_grad_(requires_grad=False)
    parameter_groups(model, 0.1)


def test_empty_groups_are_left_out():
    assert len(parameter_groups(RMSNorm(3, 1e-5), 0.1)) == 1
    assert len(parameter_groups(Linear(3, 3), 0.1)) == 1


def test_a_step_is_adamw_by_hand():
    model = Linear(3, 2)
    with torch.no_grad():
        model.weight.normal_()
    before = model.weight.detach().clone()
    optimizer = build_optimizer(model, CONFIG)
    gradient = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, -1.0]])
    model.weight.grad = gradient.clone()
    optimizer.step()
    # After one step the corrected moments are the gradient and its square.
    update = gradient / (gradient.abs() + CONFIG.eps)
    wanted = before * (1 - CONFIG.lr * CONFIG.weight_decay) - CONFIG.lr * update
    torch.testing.assert_close(model.weight.detach(), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_trainable_parameters_must_be_masters(dtype):
    model = Block()
    model.in_proj.to(dtype)
    with pytest.raises(ConfigError, match=r"'in_proj\.weight' is torch"):
        build_optimizer(model, CONFIG)
    model.in_proj.requires_grad_(requires_grad=False)
    build_optimizer(model, CONFIG)


def test_a_frozen_model_is_refused():
    model = Linear(2, 2).requires_grad_(requires_grad=False)
    with pytest.raises(ConfigError, match="no trainable parameter"):
        build_optimizer(model, CONFIG)


@pytest.mark.parametrize("stop", [0, 1, 7])
def test_a_resumed_run_is_bit_equal(tmp_path, stop):
    straight = seeded_model()
    optimizer = build_optimizer(straight, CONFIG)
    wanted = train(straight, optimizer, range(12))

    first = seeded_model()
    optimizer = build_optimizer(first, CONFIG)
    losses = train(first, optimizer, range(stop))
    tensors = {f"model.{name}": tensor for name, tensor in first.state_dict().items()}
    tensors |= {f"optim.{k}": tensor for k, tensor in optimizer_tensors(optimizer, first).items()}
    CheckpointStore(tmp_path).save(stop, tensors=tensors, state={})

    loaded = CheckpointStore(tmp_path).load().tensors
    second = seeded_model(seed=1)
    second.load_state_dict({k[6:]: t for k, t in loaded.items() if k.startswith("model.")})
    optimizer = build_optimizer(second, CONFIG)
    state = {k[6:]: tensor for k, tensor in loaded.items() if k.startswith("optim.")}
    load_optimizer_tensors(optimizer, second, state)
    losses += train(second, optimizer, range(stop, 12))

    assert losses == wanted
    for name, tensor in straight.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name


def test_state_is_named_by_parameter_and_complete():
    model = seeded_model()
    optimizer = build_optimizer(model, CONFIG)
    before = optimizer_tensors(optimizer, model)
    train(model, optimizer, range(2))
    after = optimizer_tensors(optimizer, model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    kinds = ("step", "exp_avg", "exp_avg_sq")
    assert before.keys() == after.keys() == {f"{k}.{name}" for k in kinds for name in trainable}
    assert after["step.in_proj.weight"] == 2
    assert after["step.unused.weight"] == 0
    assert after["exp_avg.A_log"].shape == (2, 3)


def test_loading_does_not_share_memory_with_the_checkpoint():
    model = seeded_model()
    optimizer = build_optimizer(model, CONFIG)
    train(model, optimizer, range(1))
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, model).items()}
    kept = {name: tensor.clone() for name, tensor in saved.items()}
    load_optimizer_tensors(optimizer, model, saved)
    train(model, optimizer, range(1, 3))
    assert all(torch.equal(saved[name], kept[name]) for name in kept)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("exp_avg.D"), "'exp_avg.D' is missing"),
        (lambda t: t.update({"exp_avg.Z": torch.ones(1)}), "'exp_avg.Z' is unknown"),
        (lambda t: t.update({"exp_avg.D": torch.ones(9)}), r"'exp_avg\.D' has shape \[9\]"),
        (
            lambda t: t.update({"step.D": torch.ones(2)}),
            r"'step\.D' has shape \[2\], expected \[\]",
        ),
    ],
)
def test_state_of_another_model_is_refused(edit, message):
    model = seeded_model()
    optimizer = build_optimizer(model, CONFIG)
    tensors = optimizer_tensors(optimizer, model)
    edit(tensors)
    with pytest.raises(CheckpointError, match=message):
        load_optimizer_tensors(optimizer, model, tensors)


def test_clipping_returns_the_norm_before():
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad = torch.tensor([3.0, 0.0])
    parameters[1].grad = torch.tensor([4.0])
    assert clip_gradients(parameters, None) == 5.0
    assert parameters[1].grad == 4.0
    assert clip_gradients(parameters, 1.0) == 5.0
    assert clip_gradients(parameters, 1.0) == pytest.approx(1.0, abs=1e-5)
    assert clip_gradients(parameters, 10.0) == pytest.approx(1.0, abs=1e-5)
    parameters[0].grad[0] = math.nan
    assert clip_gradients(parameters, 1.0).isnan()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": 1.0, "betas": (0.9, 1.0)}, "betas are"),
        ({"lr": 1.0, "eps": 0.0}, "eps is"),
        ({"lr": 1.0, "weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"lr": 1.0, "clip_grad_norm": 0.0}, "clip_grad_norm is 0.0"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        AdamWConfig(**fields)


def test_a_step_of_gradient_descent_by_hand():
    model = Linear(3, 2)
    with torch.no_grad():
        model.weight.normal_()
    before = model.weight.detach().clone()
    config = SGDConfig(lr=0.1, momentum=0.5, weight_decay=0.2)
    optimizer = build_optimizer(model, config)
    gradient = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, -1.0]])
    momentum, wanted = torch.zeros(2, 3), before
    for _ in range(2):
        model.weight.grad = gradient.clone()
        optimizer.step()
        momentum = 0.5 * momentum + gradient + 0.2 * wanted
        wanted = wanted - 0.1 * momentum
    torch.testing.assert_close(model.weight.detach(), wanted)
    assert optimizer_tensors(optimizer, model).keys() == {"momentum_buffer.weight"}


def test_without_momentum_there_is_no_state():
    model = Linear(3, 2)
    optimizer = build_optimizer(model, SGDConfig(lr=0.1, momentum=0.0))
    model.weight.grad = torch.ones(2, 3)
    optimizer.step()
    assert optimizer_tensors(optimizer, model) == {}
    load_optimizer_tensors(optimizer, model, {})


@pytest.mark.parametrize("momentum", [-0.1, 1.0, math.nan])
def test_impossible_momentum_is_refused(momentum):
    with pytest.raises(ConfigError, match="momentum is"):
        SGDConfig(lr=1.0, momentum=momentum)


@pytest.mark.parametrize("config", [CONFIG, SGDConfig(lr=1.0)])
def test_the_configuration_is_recorded(config):
    assert from_record(OptimizerConfig, to_record(config)) == config
