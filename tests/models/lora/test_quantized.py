"""Adapters beside quantized weights: training, engine and files, against the dequantized model."""

import copy

import pytest
import torch
from safetensors import safe_open

from nemotron3.inference.model_runner import ModelRunner
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.lora import (
    LoRAConfig,
    adapter_of,
    add_lora,
    dequantized_with,
    has_quantized_base,
    merge_into,
    read_adapter,
    shared_model,
    trained_tensors,
    write_adapter,
)
from nemotron3.models.precision import convert_weights
from nemotron3.ops.weights import FORMATS, QuantizedWeight, dequantized
from tests.models.lora.adapted import EVERYTHING, PATTERN, with_change
from tests.tiny import WHOLE_BLOCKS, qwen_config, tiny_config, tiny_model, tokens_for
from tests.tolerances import DECODE, FLOAT32

MODELS = {
    "whole": tiny_config(PATTERN, **WHOLE_BLOCKS),
    "wide experts": tiny_config("ME*E", moe={"moe_latent_size": None, **WHOLE_BLOCKS["moe"]}),
    "transformer": qwen_config(moe={"moe_intermediate_size": 112}),
}
every_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
every_format = pytest.mark.parametrize("weights", FORMATS)
SCALE = EVERYTHING.scale


def lora_for(config, targets=EVERYTHING.targets):
    chosen = tuple(t for t in targets if config.mamba is not None or t != "out_proj")
    return LoRAConfig(rank=3, alpha=7.0, targets=chosen)


def adapted(config, weights, targets=EVERYTHING.targets, *, seed=0):
    """A quantized model with an adapter, and the dequantized one with the same."""
    model = convert_weights(tiny_model(config), weights)
    if config.moe is not None:
        for router in model.routers:  # an expert that no token chooses
            router.e_score_correction_bias[2] = -100.0
    plain = convert_weights(model, None)
    for each in (model, plain):
        add_lora(each, lora_for(config, targets), seed=seed)
        with_change(each, seed=seed)
    return model, plain


def head(output):
    return [h @ dequantized(output.output_weight, h.dtype).to(h.dtype).T for h in output.hidden]


def loss_of(model, tokens, lengths, **options):
    depths = model.config.pattern.num_mtp_depths
    layout = SequenceLayout.packed(lengths)
    parts = model(tokens, layout=layout, head=head, mtp_depths=depths, **options)
    return sum((part.square() * torch.linspace(-1, 1, part.shape[-1])).mean() for part in parts)


def gradients_of(model, *args, **options):
    loss_of(model, *args, **options).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_gradients_close(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        off = (ours[name].double() - gradient.double()).abs().max()
        assert off <= tolerance * max(float(gradient.abs().max()), 1e-3), name


@every_format
@every_model
@pytest.mark.parametrize("lengths", [[19, 1, 7], [1]], ids=str)
def test_gradients_are_those_beside_the_dequantized_weights(config, weights, lengths):
    """In float32 by compiled code that reads the codes, and in float64 by PyTorch's operations."""
    model, plain = adapted(config, weights)
    tokens = tokens_for(config, sum(lengths))
    exact = gradients_of(copy.deepcopy(plain).double(), tokens, lengths)
    ours, others = (
        gradients_of(each, tokens, lengths) for each in (model, copy.deepcopy(model).double())
    )
    assert_gradients_close(others, exact, FLOAT32)
    assert_gradients_close(ours, exact, 10 * FLOAT32)
    assert all(p.grad is None for n, p in model.named_parameters() if n not in ours)
    assert ours.keys() == trained_tensors(model).keys()


@every_format
@every_model
@torch.no_grad()
def test_logits_are_those_of_the_dequantized_model(config, weights, assert_close):
    """Also of what an adapter leaves, and of a model of plain weights that is made of both."""
    model, plain = adapted(config, weights)
    tokens = tokens_for(config, 2, 37)
    logits = model(tokens)
    assert_close(logits, plain(tokens), 5 * FLOAT32)
    base = shared_model(model, {})
    assert (logits - base(tokens)).abs().max() > 0.05
    assert_close(base(tokens), shared_model(plain, {})(tokens), 5 * FLOAT32)
    assert_close(dequantized_with(base, adapter_of(model))(tokens), logits, 5 * FLOAT32)


@every_format
@every_model
@torch.inference_mode()
def test_recorded_steps_follow_the_adapter(config, weights, assert_close):
    """Steps that were recorded before an update replay with the change after it."""
    model, _ = adapted(config, weights)
    tokens = tokens_for(config, 3, 13)
    served = shared_model(model)
    runner = ModelRunner(served, served.new_state(3))

    def decoded():
        for slot in range(3):
            runner.cache.free(slot)
        steps = [runner.decode(p.tolist(), [0, 1, 2]).logits.clone() for p in tokens.split(1, 1)]
        return torch.cat(steps, 1)

    first = decoded()
    assert_close(first, model(tokens), DECODE)
    with_change(model, seed=1)
    merge_into(served, model)
    second = decoded()
    assert_close(second, model(tokens), DECODE)
    assert (second - first).abs().max() > 0.05


@every_format
def test_a_shared_model_has_memory_of_its_own_for_the_changes_alone(weights):
    model, _ = adapted(MODELS["whole"], weights)
    served = shared_model(model)
    ours = model.state_dict()
    own = {n for n, t in served.state_dict().items() if t.data_ptr() != ours[n].data_ptr()}
    assert own == trained_tensors(model).keys()
    assert has_quantized_base(served)
    assert not any(p.requires_grad for n, p in served.named_parameters() if n in own)


def test_targets_may_leave_a_half_of_the_experts(assert_close):
    """One of both matrices with a change, and the frozen ones around: gradients pass through."""
    for targets in (("experts.up_proj",), ("experts.down_proj", "q_proj"), ("in_proj",)):
        model, plain = adapted(MODELS["whole"], "nvfp4", targets)
        tokens = tokens_for(model.config, 23)
        ours, theirs = (gradients_of(each, tokens, [23]) for each in (model, plain))
        assert_gradients_close(ours, theirs, 10 * FLOAT32)
        with torch.no_grad():
            assert_close(model(tokens[None]), plain(tokens[None]), 5 * FLOAT32)


def test_recomputed_blocks_have_the_same_gradients():
    model, _ = adapted(MODELS["whole"], "fp8")
    tokens = tokens_for(model.config, 27)
    first = gradients_of(model, tokens, [19, 8])
    model.zero_grad()
    again = gradients_of(model, tokens, [19, 8], recompute=True)
    assert all(torch.equal(again[name], gradient) for name, gradient in first.items())


def test_training_keeps_codes_alone():
    """Of all that autograd keeps for the backward pass, nothing has the size of a matrix."""
    model, _ = adapted(MODELS["whole"], "nvfp4")
    shapes = set()

    def keep(tensor):
        shapes.add(tuple(tensor.shape))
        return tensor

    tokens = tokens_for(model.config, 5)
    for each in (model, copy.deepcopy(model).bfloat16()):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
            loss = loss_of(each, tokens, [5])
        loss.backward()
    matrices = {tuple(m.shape) for m in model.modules() if isinstance(m, QuantizedWeight)}
    output = tuple(model.lm_head.weight.shape)  # of the loss above, which has no fused operation
    found = {m[-2:] for m in matrices} | matrices
    assert shapes.isdisjoint(found - {output})


@every_format
def test_an_adapter_is_saved_and_read_beside_quantized_weights(tmp_path, weights):
    config = MODELS["whole"]
    model, _ = adapted(config, weights)
    write_adapter(tmp_path / "adapter", model, lora_for(config), base="base")
    read = read_adapter(tmp_path / "adapter", shared_model(model, {}))
    for name, change in adapter_of(model).items():
        assert torch.equal(read[name].A, change.A)
        assert torch.equal(read[name].B, change.B)
    # The names are those that an adapter of the plain model has.
    plain = tiny_model(config)
    add_lora(plain, lora_for(config), seed=0)
    write_adapter(tmp_path / "plain", plain, lora_for(config), base="base")
    names = [
        safe_open(tmp_path / which / "adapter_model.safetensors", framework="pt").keys()
        for which in ("adapter", "plain")
    ]
    assert set(names[0]) == set(names[1])
