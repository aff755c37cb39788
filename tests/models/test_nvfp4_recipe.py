"""Which products of a model are in NVFP4, and what training in it promises."""

import dataclasses
from contextlib import suppress
from functools import partial

import pytest
import torch

from nemotron3.checkpoint.store import CheckpointStore
from nemotron3.errors import ConfigError
from nemotron3.inference.config import EngineConfig
from nemotron3.inference.engine.engine import Engine
from nemotron3.models.config import ModelConfig
from nemotron3.models.experts import RoutedExperts
from nemotron3.models.lora import LoRAConfig, add_lora
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.nvfp4_recipe import NVFP4Config, quantized_modules
from nemotron3.models.precision import (
    PrecisionConfig,
    apply_precision,
    check_precision,
    convert_weights,
)
from nemotron3.observe.metrics import MetricLog
from nemotron3.ops.experts import routed_experts
from nemotron3.recipes.rl import tiny_rl
from nemotron3.training.optimizers import AdamWConfig, SGDConfig, build_optimizer
from nemotron3.training.schedules import WSD
from nemotron3.training.step import TrainingStep
from nemotron3.training.trainer import Trainer, TrainingConfig
from tests.tiny import tiny_config
from tests.training.batches import documents, pack, pretraining

SIZES = {
    "hidden_size": 64,
    "mamba": {"mamba_num_heads": 8, "ssm_state_size": 16},
    "moe": {"moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 48},
}
NVFP4 = PrecisionConfig(recipe="nvfp4")


def config(pattern="MEM*EM-E/*E/*E", **changes):
    sizes = SIZES | ({"mlp": {"intermediate_size": 80}} if "-" in pattern else {})
    return tiny_config(pattern, **(sizes | changes))


def formats(model_config, nvfp4=None):
    with torch.device("meta"):
        model = LanguageModel(model_config)
    return {
        f"{m.layer} {m.name}": m.format for m in quantized_modules(model, nvfp4 or NVFP4Config())
    }


def test_products_have_the_formats_of_the_published_table():
    assert formats(config()) == {
        "0 in_proj": "nvfp4",
        "0 out_proj": "mxfp8",
        "1 experts": "nvfp4",
        "1 shared_experts.up_proj": "nvfp4",
        "1 shared_experts.down_proj": "nvfp4",
        "2 in_proj": "nvfp4",
        "2 out_proj": "mxfp8",
        "4 experts": "nvfp4",
        "4 shared_experts.up_proj": "nvfp4",
        "4 shared_experts.down_proj": "nvfp4",
        "5 in_proj": "nvfp4",
        "5 out_proj": "mxfp8",
    }  # of layer 3 (attention), 6 and 7 (the tail), the MTP block and the output layer nothing


def test_the_tail_of_super_is_14_of_88_layers():
    assert NVFP4Config().layers(88) == 88 - 14
    assert NVFP4Config().layers(20) == 17  # 15% is a whole number of layers
    assert NVFP4Config(high_precision_tail=0.0).layers(7) == 7


def test_without_a_tail_every_layer_is_in_few_bits():
    found = formats(config(), NVFP4Config(high_precision_tail=0.0))
    assert found["6 up_proj"] == found["7 experts"] == "nvfp4"


def test_modules_and_not_others_hold_a_format():
    model = LanguageModel.from_config(config())
    apply_precision(model, NVFP4)
    held = {n for n, m in model.named_modules() if getattr(m, "quantization", None) is not None}
    assert held == {
        f"backbone.layers.{layer}.mixer.{name}"
        for layer, name in (key.split(" ") for key in formats(config()))
    }
    apply_precision(model, PrecisionConfig())
    assert all(getattr(m, "quantization", None) is None for m in model.modules())


@pytest.mark.parametrize(("changes", "message"), [
    ({"hidden_size": 72}, r"layers.0.mixer.in_proj.weight has 72 inputs, and blocks of NVFP4 are"),
    ({"moe": {"moe_intermediate_size": 24}}, r"layers.1.mixer.experts.down_proj has 24 inputs"),
    ({"moe": {"moe_shared_expert_intermediate_size": 40, "moe_intermediate_size": 32}},
     r"layers.1.mixer.shared_experts.down_proj.weight has 40 inputs"),
    ({"mamba": {"mamba_num_heads": 6, "ssm_state_size": 16}},
     r"layers.0.mixer.out_proj.weight has 48 inputs, and blocks of MXFP8 are of 32"),
])  # fmt: skip
def test_sizes_that_blocks_do_not_divide_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_precision(config(**changes), NVFP4)
    check_precision(config(**changes), PrecisionConfig())


@pytest.mark.parametrize("preset", ["tiny", "small", "nano"])
def test_presets_fit(preset):
    check_precision(ModelConfig.preset(preset), NVFP4)


def test_int8_weights_are_refused():
    model = convert_weights(LanguageModel.from_config(config()), "int8")
    with pytest.raises(ConfigError, match=r"in_proj.weight is in int8.*convert_weights"):
        apply_precision(model, NVFP4)


@pytest.mark.parametrize(("options", "message"), [
    ({"products": ()}, "name one or more of fprop, dgrad, wgrad"),
    ({"products": ("fprop", "fprop")}, "each once"),
    ({"high_precision_tail": 1.0}, "high_precision_tail is 1.0; it is a share"),
    ({"gradients": "ms_eden", "transform": "none"}, "transform is 'none' and gradients is"),
    ({"fprop_steps": 0}, "fprop_steps is 0; it must be 1 or more.*leave fprop out of products"),
    ({"fprop_steps": 9, "products": ("dgrad",)}, r"fprop_steps is 9 and products is \['dgrad'\]"),
    ({"fprop_steps": 9, "products": ("fprop",)}, "while gradients go on being rounded"),
    ({"weights": "2d"}, "choose from tiles, 1d"),
])  # fmt: skip
def test_impossible_ingredients_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        NVFP4Config(**options)


def test_ingredients_without_the_recipe_are_refused():
    with pytest.raises(ConfigError, match="nvfp4 has values of its own and recipe is 'plain'"):
        PrecisionConfig(nvfp4=NVFP4Config(seed=1))


# Training


def update(microbatches, precision=NVFP4, *, updates=0, recompute=False):
    model = LanguageModel.from_config(config(), seed=3)
    apply_precision(model, precision)
    optimizer = build_optimizer(model, SGDConfig(lr=0.1), ())
    step = TrainingStep(
        model, optimizer, pretraining(model), clip_grad_norm=None, recompute=recompute
    )
    step.updates = updates
    metrics = step(microbatches, learning_rate=0.1)
    return metrics["train/loss"], metrics["optim/grad_norm"], model


def batch(seed=1):
    return [pack(documents(12, 21, seed=seed))]


def test_a_step_is_near_the_step_in_float32():
    loss, norm, _ = update(batch())
    wanted_loss, wanted_norm, _ = update(batch(), PrecisionConfig())
    assert 0 < abs(loss - wanted_loss) < 0.1
    assert 0.5 < norm / wanted_norm < 2


def test_a_step_is_a_function_of_its_number():
    first, again, later = (update(batch(), updates=updates) for updates in (4, 4, 5))
    assert first[:2] == again[:2]
    assert first[0] == later[0]  # the forward pass rounds to nearest
    assert first[1] != later[1]


def test_recomputed_blocks_round_alike():
    _, norm, _ = update(batch())
    _, again, _ = update(batch(), recompute=True)
    assert norm == again


def test_measuring_counts_flushed_values_and_zero_gradients():
    model = LanguageModel.from_config(config(), seed=3)
    apply_precision(model, NVFP4)
    results = []
    for is_compiled in (True, False):
        if not is_compiled:  # the experts' definition counts alike
            for module in model.modules():
                if isinstance(module, RoutedExperts) and module.quantization is not None:
                    module.forward = partial(_defined, module)
        optimizer = build_optimizer(model, SGDConfig(lr=0.1), ())
        step = TrainingStep(
            model, optimizer, pretraining(model), clip_grad_norm=None, bias_update_rate=0.0
        )
        metrics = step(batch(), learning_rate=0.0, measure=True)
        results.append({n: v for n, v in metrics.items() if n.startswith("precision/")})
    rounded = sorted({int(key.split()[0]) for key in formats(config())})
    assert set(results[0]) == {"precision/zero_gradients"} | {
        f"precision/{name}_layer_{layer:02d}"
        for layer in rounded
        for name in ("flushed_fprop", "flushed_dgrad", "flushed_wgrad", "zero_gradients")
    }
    flushed = {name: value for name, value in results[0].items() if "flushed" in name}
    assert all(0.001 < value < 0.5 for value in flushed.values())
    assert results[0] == pytest.approx(results[1], rel=0.02, abs=1e-3)
    assert not [n for n in step(batch(), learning_rate=0.0) if n.startswith("precision/")]


def _defined(module, x, routing):
    return routed_experts(
        x, routing.indices, routing.weights, module.up_proj, module.down_proj,
        activation="relu2", quantization=module.quantization, backend="torch",
    )  # fmt: skip


def test_measuring_changes_nothing():
    norms = []
    for measure in (True, False):
        model = LanguageModel.from_config(config(), seed=3)
        apply_precision(model, NVFP4)
        optimizer = build_optimizer(model, SGDConfig(lr=0.1), ())
        step = TrainingStep(model, optimizer, pretraining(model), clip_grad_norm=None)
        norms.append(step(batch(), learning_rate=0.1, measure=measure)["optim/grad_norm"])
    assert norms[0] == norms[1]


def test_microbatches_have_different_noise():
    """Two equal microbatches: their gradients differ by noise, and each is that of its tokens."""
    twice = [batch()[0], batch()[0]]
    grads = []
    for microbatches in (twice, batch()):
        model = update(microbatches)[2]
        grads.append(model.backbone.layers[0].mixer.in_proj.weight.grad)
    assert not torch.equal(grads[0], grads[1])  # each half counts half
    apart = (grads[0] - grads[1]).norm() / grads[1].norm()
    assert 0.001 < apart < 0.5


TRAINING = TrainingConfig(
    steps=6,
    batch_size=2,
    microbatch_size=1,
    seq_len=12,
    optimizer=AdamWConfig(lr=1e-2),
    schedule=WSD(total_steps=6, warmup_steps=1, decay_steps=3),
    checkpoint_every_steps=2,
    precision=NVFP4,
)


SWITCHED = dataclasses.replace(NVFP4, nvfp4=NVFP4Config(fprop_steps=3))
"""The forward pass of the first three updates is rounded."""


def trained(folder, *, until=None, precision=NVFP4):
    """The losses of a run that is stopped after `until` updates, or goes on from there."""
    model = LanguageModel.from_config(config(), seed=3)
    trainer = Trainer(
        model,
        dataclasses.replace(TRAINING, precision=precision),
        objective=pretraining(model),
        batches=lambda step: [pack([part]) for part in documents(12, 12, seed=step)],
        evaluation=lambda _: {},
        store=CheckpointStore(folder),
        peak_flops=1e9,
    )
    trainer.resume()
    losses = []

    def on_step(report):
        losses.append(report.metrics["train/loss"])
        if report.step == until:
            raise KeyboardInterrupt

    with MetricLog([]) as log, suppress(KeyboardInterrupt):
        trainer.fit(log, on_step=on_step)
    return losses, model


@pytest.mark.parametrize(("precision", "until"), [(NVFP4, 4), (SWITCHED, 2), (SWITCHED, 4)])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path, precision, until):
    """Also where the precision of the forward pass changes after, or before, it is resumed."""
    whole, model = trained(tmp_path / "whole", precision=precision)
    start, _ = trained(tmp_path / "parts", until=until, precision=precision)
    rest, resumed = trained(tmp_path / "parts", precision=precision)
    assert start + rest == whole
    for a, e in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, e)


def test_the_forward_pass_switches_to_high_precision_at_its_step():
    before, after = (update(batch(), SWITCHED, updates=updates)[:2] for updates in (2, 3))
    assert before == update(batch(), updates=2)[:2]
    gradients_only = dataclasses.replace(NVFP4, nvfp4=NVFP4Config(products=("dgrad", "wgrad")))
    assert after == update(batch(), gradients_only, updates=3)[:2]
    assert after[0] != before[0]


def test_a_switch_that_training_does_not_reach_is_refused():
    with pytest.raises(ConfigError, match=r"precision.nvfp4.fprop_steps is 6 and steps is 6"):
        dataclasses.replace(
            TRAINING, precision=dataclasses.replace(NVFP4, nvfp4=NVFP4Config(fprop_steps=6))
        )


def test_the_loss_falls():
    model = LanguageModel.from_config(config(), seed=3)
    apply_precision(model, NVFP4)
    optimizer = build_optimizer(model, AdamWConfig(lr=5e-3), ())
    step = TrainingStep(model, optimizer, pretraining(model), clip_grad_norm=1.0)
    losses = [step(batch(), learning_rate=5e-3)["train/loss"] for _ in range(25)]
    assert losses[-1] < 0.7 * losses[0]


def test_evaluation_runs_in_the_same_precision_and_repeats():
    model = LanguageModel.from_config(config(), seed=3)
    tokens = torch.arange(30).view(2, 15)
    with torch.no_grad():
        plain = model(tokens)
        apply_precision(model, NVFP4)
        first = model(tokens)
        model.rounding_position.step = 9
        again = model(tokens)
    assert torch.equal(first, again)
    assert not torch.equal(first, plain)


def test_two_models_keep_their_precision_and_position():
    """Nothing is shared between models of one process."""
    one, two = (LanguageModel.from_config(config(), seed=3) for _ in range(2))
    apply_precision(one, NVFP4)
    one.rounding_position.step = 9
    tokens = torch.arange(30).view(2, 15)
    assert two.rounding_position.step == 0
    assert not torch.equal(one(tokens), two(tokens))


def test_an_adapter_trains_beside_few_bits():
    model = LanguageModel.from_config(config(), seed=3)
    add_lora(model, LoRAConfig(rank=2), seed=0)
    apply_precision(model, NVFP4)
    model(torch.arange(30).view(2, 15)).square().mean().backward()
    changed = [n for n, p in model.named_parameters() if p.grad is not None]
    assert any("in_proj.weight.B" in name for name in changed)


def test_reinforcement_learning_refuses_it():
    run = tiny_rl()
    with pytest.raises(ConfigError, match=r"training.precision.recipe is 'nvfp4'; engines play"):
        dataclasses.replace(run, training=dataclasses.replace(run.training, precision=NVFP4))


def test_an_engine_refuses_a_model_in_training():
    model = LanguageModel.from_config(config(), seed=3)
    apply_precision(model, NVFP4)
    with pytest.raises(ConfigError, match="the model trains in NVFP4"):
        Engine(model)
    apply_precision(model, NVFP4.unrounded)
    Engine(model, EngineConfig(max_num_seqs=1, max_model_len=32))


def test_ingredients_are_values_of_a_configuration():
    own = dataclasses.replace(NVFP4, nvfp4=NVFP4Config(products=("fprop",)))
    loss, _, _ = update(batch(), own)
    assert loss == update(batch())[0]  # fprop is the same
