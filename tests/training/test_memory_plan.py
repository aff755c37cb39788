"""A plan's bytes are those of real tensors, and its upper bounds are bounds."""

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from nemotron3.errors import ConfigError
from nemotron3.models.config import ModelConfig
from nemotron3.models.lora import LoRAConfig, add_lora, shared_model, trained_tensors
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.parameter import quantizable_names
from nemotron3.models.precision import PrecisionConfig, convert_weights
from nemotron3.ops import native, weights
from nemotron3.recipes.adapters import model_to_train
from nemotron3.recipes.memory import quantized_bytes
from nemotron3.runtime.memory import plan_of
from nemotron3.training import memory_plan
from nemotron3.training.memory_plan import (
    ACTIVATIONS,
    ADAPTER,
    COPIES,
    GRADIENTS,
    LOSS,
    MOMENTS,
    WEIGHTS,
    LowRankPlan,
    least_bytes,
    low_rank_plan,
    merged_copy_bytes,
    training_parts,
)
from nemotron3.training.optimizers import (
    AdamWConfig,
    SGDConfig,
    build_optimizer,
    optimizer_tensors,
)
from nemotron3.training.parameter_groups import (
    ParameterGroupConfig,
    freeze_parameters,
    freeze_unread_parameters,
)
from nemotron3.training.schedules import Constant
from nemotron3.training.step import TrainingStep
from nemotron3.training.trainer import TrainingConfig
from tests.tiny import WHOLE_BLOCKS, qwen_config, tiny_config
from tests.training.batches import documents, forward, pack, pretraining

CPU = torch.device("cpu")
MODELS = {
    "every mixer": tiny_config("MEM*E-/*E/*E"),
    "tied": tiny_config("ME*-", tie_word_embeddings=True),
    "qwen": qwen_config(),
    "tiny": ModelConfig.preset("tiny"),
}
every_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
TOLERANCE = 1.4
"""How far an upper bound may be above what a small model keeps."""


def training_config(**changes):
    fields = {
        "steps": 1,
        "batch_size": 2,
        "microbatch_size": 2,
        "seq_len": 128,
        "optimizer": AdamWConfig(lr=1e-3),
        "schedule": Constant(),
    }
    return TrainingConfig(**(fields | changes))


def planned(config, training=None, *, mtp_depths=0, **options):
    training = training or training_config()
    parts = training_parts(config, training, mtp_depths=mtp_depths, **options)
    return {part.name: part.num_bytes for part in parts}


def nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def updated(config, training, *, mtp_depths):
    """A real model and its optimizer, after an update whose gradients are all there."""
    model = LanguageModel.from_config(config)
    freeze_parameters(model, training.parameter_groups)
    freeze_unread_parameters(model, mtp_depths=mtp_depths)
    optimizer = build_optimizer(model, training.optimizer, training.parameter_groups)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return model, optimizer


@every_model
@pytest.mark.parametrize(
    "optimizer", [AdamWConfig(lr=1e-3), SGDConfig(lr=1e-3), SGDConfig(lr=1e-3, momentum=0.0)]
)
@pytest.mark.parametrize("frozen", [(), ("*.norm.weight", "backbone.layers.0.*")])
@pytest.mark.parametrize("has_mtp", [True, False])
def test_weights_gradients_and_moments_are_exact(config, optimizer, frozen, has_mtp):
    groups = ()
    if frozen:
        groups = (ParameterGroupConfig(name="some", parameters=frozen, is_frozen=True),)
    training = training_config(optimizer=optimizer, parameter_groups=groups)
    depths = config.pattern.num_mtp_depths if has_mtp else 0
    model, made = updated(config, training, mtp_depths=depths)
    plan = planned(config, training, mtp_depths=depths)
    assert plan[WEIGHTS] == nbytes(model.state_dict(keep_vars=True).values())
    assert plan[GRADIENTS] == nbytes(p.grad for p in model.parameters() if p.grad is not None)
    assert plan[MOMENTS] == nbytes(optimizer_tensors(made, model).values())


@every_model
@pytest.mark.parametrize("activations", ["float32", "bfloat16"])
@pytest.mark.parametrize("has_mtp", [True, False])
def test_what_an_adapter_needs_is_exact(config, activations, has_mtp, tmp_path):
    """Against a model as a run reads it, its engine's merged copies, and an update's optimizer."""
    LanguageModel.from_config(config).save_pretrained(tmp_path)
    lora, precision = LoRAConfig(rank=4), PrecisionConfig(activations=activations)
    training = training_config(precision=precision, bias_update_rate=0.0)
    model = model_to_train(str(tmp_path), lora, precision=precision, device=CPU, seed=0)
    depths = config.pattern.num_mtp_depths if has_mtp else 0
    freeze_unread_parameters(model, mtp_depths=depths)
    optimizer = build_optimizer(model, training.optimizer)
    adapter = list(trained_tensors(model).values())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    low_rank = low_rank_plan(config, lora)
    plan = planned(config, training, mtp_depths=depths, low_rank=low_rank)
    assert plan[WEIGHTS] == nbytes(model.state_dict().values()) - nbytes(adapter)
    assert plan[ADAPTER] == nbytes(adapter)
    assert plan[GRADIENTS] == nbytes(p.grad for p in model.parameters() if p.grad is not None)
    assert plan[MOMENTS] == nbytes(optimizer_tensors(optimizer, model).values())
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    copies = [t for t in shared_model(model).state_dict().values() if t.data_ptr() not in own]
    assert merged_copy_bytes(config, low_rank, precision.dtype) == nbytes(copies) > 0


def test_an_adapter_is_a_pair_of_matrices_for_each_product():
    config = tiny_config("M*E")
    width, rank, experts = config.hidden_size, 5, config.moe.n_routed_experts
    names = {"q_proj": 4 * 20 + width, "experts.up_proj": experts * (24 + 32)}
    for target, elements in names.items():
        low_rank = low_rank_plan(config, LoRAConfig(rank=rank, targets=(target,)))
        plan = planned(config, low_rank=low_rank)
        assert plan[ADAPTER] == 4 * rank * elements
    assert merged_copy_bytes(config, low_rank, torch.float32) == 4 * experts * 24 * 32
    assert planned(config, low_rank=replace(low_rank, is_adapted=lambda _: False))[ADAPTER] == 0
    with pytest.raises(ConfigError, match="closest are up_proj"):
        low_rank_plan(config, LoRAConfig(targets=("up_projj",)))


def kept_bytes(config, training, *, mtp_depths):
    """What a forward pass keeps for the backward pass, each memory once, without parameters."""
    model = LanguageModel.from_config(config)
    model.activation_dtype = training.precision.dtype
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes(), tensor  # alive, so that no place is reused
        return tensor

    objective = pretraining(model, mtp_loss_scaling=0.3 if mtp_depths else 0.0)
    lengths = [training.seq_len] * training.microbatch_size
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        terms = forward(model, pack(documents(*lengths)), objective)
    assert terms.total.requires_grad
    return sum(size for size, _ in held.values())


@every_model
@pytest.mark.skipif(not native.available(), reason="without C++ other operations keep more")
def test_what_a_forward_pass_keeps_is_within_its_bound(config):
    for depths in {0, config.pattern.num_mtp_depths}:
        training = training_config(seq_len=192)
        plan = planned(config, training, mtp_depths=depths)
        assert plan[COPIES] == 0
        tokens, width = training.microbatch_size * training.seq_len, config.hidden_size
        of_heads = (1 + depths) * 4 * width * (config.vocab_size + tokens)
        assert of_heads < plan[LOSS]  # the rest are logits, which go within the pass
        bound = plan[ACTIVATIONS] + of_heads
        assert bound / TOLERANCE <= kept_bytes(config, training, mtp_depths=depths) <= bound


@pytest.mark.parametrize("is_compiled", [False, True])
def test_copies_in_bfloat16_are_those_of_products(is_compiled, monkeypatch):
    """PyTorch's own operations take copies of weights; compiled ones round them as they read."""
    monkeypatch.setattr(native, "available", lambda: is_compiled)
    config = tiny_config("-*")
    precision = PrecisionConfig(activations="bfloat16")
    few, more = (training_config(seq_len=n, precision=precision) for n in (1, 2))
    model = LanguageModel.from_config(config)
    products = [p for n, p in model.named_parameters() if "proj" in n]
    copies = 0 if is_compiled else sum(2 * p.numel() for p in products)
    assert planned(config, few)[COPIES] == copies
    # A difference of token counts has no weights, so twice the smaller less the larger has all.
    alone = 2 * kept_bytes(config, few, mtp_depths=0) - kept_bytes(config, more, mtp_depths=0)
    d_output = 4 * config.vocab_size * config.hidden_size
    assert alone - d_output == pytest.approx(copies, rel=0.05, abs=1000)


def highest_point(model, training, *, mtp_depths):
    """Bytes of all tensors at the highest point of an update, as PyTorch's allocator tells."""
    optimizer = build_optimizer(model, training.optimizer)
    objective = pretraining(model, mtp_loss_scaling=0.3 if mtp_depths else 0.0)
    step = TrainingStep(
        model,
        optimizer,
        objective,
        clip_grad_norm=1.0,
        bias_update_rate=training.bias_update_rate,
        recompute=training.recompute,
    )
    lengths = [training.seq_len] * training.microbatch_size
    passes = training.batch_size // training.microbatch_size
    batches = [pack(documents(*lengths, seed=seed)) for seed in range(passes)]
    step(batches, learning_rate=1e-3)  # makes the moments
    model.zero_grad(set_to_none=True)
    held = nbytes(model.state_dict(keep_vars=True).values())
    held += nbytes(optimizer_tensors(optimizer, model).values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step(batches, learning_rate=1e-3)
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return held + max(accumulate(change for _, change in changes))


@pytest.mark.slow
@pytest.mark.skipif(not native.available(), reason="without C++ other operations keep more")
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["tiny", "every mixer"])
def test_the_sum_is_above_the_highest_point_and_the_least_below(name, recompute, passes):
    config = MODELS[name]
    training = training_config(
        batch_size=4 * passes, microbatch_size=4, seq_len=256, recompute=recompute
    )
    depths = config.pattern.num_mtp_depths
    plan = plan_of(training_parts(config, training, mtp_depths=depths))
    highest = highest_point(LanguageModel.from_config(config), training, mtp_depths=depths)
    assert least_bytes(plan) <= highest <= plan.total


@pytest.mark.slow
@pytest.mark.skipif(not native.available(), reason="without C++ other operations keep more")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["tiny", "every mixer"])
@pytest.mark.parametrize("targets", [("all-linear", "out_proj", "lm_head"), ("in_proj", "q_proj")])
def test_the_sum_is_above_the_highest_point_with_an_adapter(name, recompute, targets):
    config, lora = MODELS[name], LoRAConfig(rank=4, targets=targets)
    training = training_config(
        batch_size=4, microbatch_size=4, seq_len=256, recompute=recompute, bias_update_rate=0.0
    )
    depths, low_rank = config.pattern.num_mtp_depths, low_rank_plan(config, lora)
    plan = plan_of(training_parts(config, training, mtp_depths=depths, low_rank=low_rank))
    model = LanguageModel.from_config(config)
    add_lora(model, lora, seed=0)
    assert least_bytes(plan) <= highest_point(model, training, mtp_depths=depths) <= plan.total


@pytest.mark.parametrize("weights", ["nvfp4", "int8"])
@pytest.mark.parametrize("activations", ["float32", "bfloat16"])
def test_what_an_adapter_beside_quantized_weights_needs(weights, activations, tmp_path):
    """Weights, adapter and gradients exactly, and the highest point within the sum of all."""
    config = tiny_config("MEM*E-/*E/*E", **WHOLE_BLOCKS)
    lora, precision = LoRAConfig(rank=4), PrecisionConfig(activations=activations)
    convert_weights(LanguageModel.from_config(config), weights).save_pretrained(tmp_path)
    training = training_config(
        batch_size=4, microbatch_size=4, seq_len=256, precision=precision, bias_update_rate=0.0
    )
    model = model_to_train(str(tmp_path), lora, precision=precision, device=CPU, seed=0)
    adapter = list(trained_tensors(model).values())
    low_rank = low_rank_plan(config, lora, quantized_bytes(tmp_path))
    plan = planned(config, training, mtp_depths=2, low_rank=low_rank)
    assert plan[WEIGHTS] == nbytes(model.state_dict().values()) - nbytes(adapter)
    assert plan[ADAPTER] == nbytes(adapter)
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    copies = [t for t in shared_model(model).state_dict().values() if t.data_ptr() not in own]
    assert merged_copy_bytes(config, low_rank, precision.dtype) == nbytes(copies) > 0
    whole = plan_of(training_parts(config, training, mtp_depths=2, low_rank=low_rank))
    assert least_bytes(whole) <= highest_point(model, training, mtp_depths=2) <= whole.total
    if weights == "nvfp4":
        plain = planned(config, training, mtp_depths=2, low_rank=low_rank_plan(config, lora))
        assert plan[WEIGHTS] < 0.5 * plain[WEIGHTS]


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_merged_experts_are_added_up_in_slices(recompute, monkeypatch, tmp_path):
    """In bfloat16, where weights outweigh all else and a float32 copy of one would be seen."""
    for module in (weights.low_rank, memory_plan):
        monkeypatch.setattr(module, "SLICE", 1 << 15)
    sizes = {"n_routed_experts": 16, "moe_intermediate_size": 128, "moe_latent_size": None}
    config, lora = tiny_config("EE", hidden_size=128, moe=sizes), LoRAConfig(rank=4)
    precision = PrecisionConfig(activations="bfloat16")
    training = training_config(
        batch_size=1,
        microbatch_size=1,
        seq_len=16,
        precision=precision,
        recompute=recompute,
        bias_update_rate=0.0,
    )
    plan = plan_of(
        training_parts(config, training, mtp_depths=0, low_rank=low_rank_plan(config, lora))
    )
    LanguageModel.from_config(config).save_pretrained(tmp_path)
    model = model_to_train(str(tmp_path), lora, precision=precision, device=CPU, seed=0)
    highest = highest_point(model, training, mtp_depths=0)
    assert least_bytes(plan) <= highest <= plan.total
    assert plan.total - highest < 4 * 16 * 128 * 128


def test_recomputing_keeps_one_block_at_a_time():
    config = MODELS["tiny"]
    whole = planned(config, training_config())
    parts = planned(config, training_config(recompute=True))
    assert parts[ACTIVATIONS] < 0.3 * whole[ACTIVATIONS]
    exact = (WEIGHTS, GRADIENTS, MOMENTS)
    assert [parts[name] for name in exact] == [whole[name] for name in exact]


def test_a_frozen_weight_is_not_copied(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)  # compiled products copy no weight
    config = tiny_config("M*E")
    precision = PrecisionConfig(activations="bfloat16")
    none = LowRankPlan(rank=4, is_adapted=lambda _: False)
    training = training_config(precision=precision)
    assert planned(config, training, low_rank=none)[COPIES] == 0
    assert planned(config, training)[COPIES]


sizes = st.integers(1, 600)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 6),
    seq_len=sizes,
    more_batch=st.integers(0, 3),
    more_tokens=st.integers(0, 300),
    recompute=st.booleans(),
    activations=st.sampled_from(["float32", "bfloat16"]),
    gpu_bytes=st.sampled_from([None, 80 * 10**9]),
    rank=st.sampled_from([None, 1, 8]),
)
def test_a_longer_or_larger_batch_never_needs_less(
    batch, seq_len, more_batch, more_tokens, recompute, activations, gpu_bytes, rank
):
    def plan(batch, seq_len):
        training = training_config(
            batch_size=batch,
            microbatch_size=batch,
            seq_len=seq_len,
            recompute=recompute,
            precision=PrecisionConfig(activations=activations),
        )
        low_rank = None
        if rank is not None:
            low_rank = low_rank_plan(MODELS["every mixer"], LoRAConfig(rank=rank))
        options = {"mtp_depths": 2, "low_rank": low_rank, "gpu_bytes": gpu_bytes}
        return training_parts(MODELS["every mixer"], training, **options)

    small, large = plan(batch, seq_len), plan(batch + more_batch, seq_len + more_tokens)
    for one, other in zip(small, large, strict=True):
        assert one.name == other.name
        assert 0 <= one.num_bytes <= other.num_bytes
        assert one.is_estimate or one.num_bytes == other.num_bytes
    if more_batch or more_tokens:
        assert plan_of(small).total < plan_of(large).total
    assert plan_of(small).certain == plan_of(large).certain


def test_what_a_student_computes_with_is_beside_its_matrices():
    config = tiny_config("ME*E/*E", **WHOLE_BLOCKS)
    with torch.device("meta"):
        model = LanguageModel(config)
    names = [name for name in quantizable_names(model) if name.startswith("backbone.")]
    copies = sum(4 * model.get_parameter(name).numel() for name in names)
    plain, student = planned(config), planned(config, rounded=names)
    assert plain[COPIES] == 0
    assert student[COPIES] == copies
    assert {n: student[n] for n in (WEIGHTS, GRADIENTS, MOMENTS)} == {
        n: plain[n] for n in (WEIGHTS, GRADIENTS, MOMENTS)
    }
