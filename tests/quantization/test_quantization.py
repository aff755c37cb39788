"""Formats, calibration, errors and the comparison, on a tiny model."""

import pytest
import torch

from nemotron3.data import Batch
from nemotron3.errors import CheckpointError, ConfigError, DataError
from nemotron3.models.cache.state_precision import StatePrecision
from nemotron3.models.parameter import weight_formats
from nemotron3.models.precision import convert_weights
from nemotron3.ops.experts.api import activate
from nemotron3.quantization import (
    calibrate,
    compare,
    formats_for,
    matrix_reports,
    quantized_model,
    total_bits,
)
from tests.tiny import WHOLE_BLOCKS, qwen_config, tiny_config, tiny_model, tokens_for
from tests.tolerances import FLOAT32

CONFIG = tiny_config("MEM*E-/*E", **WHOLE_BLOCKS)


def batch_of(config, *lengths, seed=1):
    tokens = tokens_for(config, sum(lengths) + 1, seed=seed)
    return Batch(
        tokens=tokens[:-1], targets=tokens[1:], loss_mask=torch.ones(sum(lengths)),
        lengths=lengths, samples={},
    )  # fmt: skip


def test_the_published_mix():
    formats = formats_for(tiny_model(CONFIG), "mixed")
    assert {name for name, kind in formats.items() if kind == "nvfp4"} == {
        f"backbone.layers.{layer}.mixer.experts.{which}_proj"
        for layer in (1, 4)
        for which in ("up", "down")
    }
    eight = {name for name, kind in formats.items() if kind == "fp8"}
    assert eight == {
        *(f"backbone.layers.{n}.mixer.{p}_proj.weight" for n in (0, 2) for p in ("in", "out")),
        *(
            f"backbone.layers.{n}.mixer.shared_experts.{p}_proj.weight"
            for n in (1, 4)
            for p in ("up", "down")
        ),
    }


@pytest.mark.parametrize("wanted", ["nvfp4", "fp8"])
def test_output_layer_and_mtp_block_stay(wanted):
    formats = formats_for(tiny_model(CONFIG), wanted)
    assert set(formats.values()) == {wanted}
    assert "backbone.layers.3.mixer.q_proj.weight" in formats
    assert "backbone.layers.1.mixer.fc1_latent_proj.weight" in formats
    assert not [name for name in formats if name.startswith(("mtp", "lm_head"))]


def test_what_no_format_fits_is_refused():
    with pytest.raises(ConfigError, match=r"'mixed', and the model has no matrix"):
        formats_for(tiny_model(tiny_config("*-", **WHOLE_BLOCKS)), "mixed")
    with pytest.raises(ConfigError, match=r"down_proj' has 24 inputs, .* not divisible by the 16"):
        formats_for(tiny_model("ME"), "nvfp4")


@pytest.mark.parametrize("config", [CONFIG, qwen_config(moe={"moe_intermediate_size": 112})],
                         ids=["hybrid", "qwen"])  # fmt: skip
def test_the_rest_is_shared_and_nothing_is_lost(config):
    model = tiny_model(config)
    formats = formats_for(model, "nvfp4")
    quantized = quantized_model(model, formats)
    assert weight_formats(quantized) == formats
    assert quantized.backbone.norm_f.weight is model.backbone.norm_f.weight
    expected = convert_weights(model, "nvfp4").state_dict()
    plain = model.state_dict()
    for name, tensor in quantized.state_dict().items():
        owner = name.rpartition(".")[0]
        wanted = expected[name] if owner in formats else plain[name]
        bits = (t.view(torch.uint8) if t.dtype.itemsize == 1 else t for t in (tensor, wanted))
        assert torch.equal(*bits), name


def test_the_squared_error_gives_smaller_errors():
    model = tiny_model(CONFIG)
    formats = formats_for(model, "nvfp4")
    totals = {}
    for scales in ("max", "mse", "four_over_six"):
        reports = matrix_reports(model, quantized_model(model, formats, scales=scales), formats)
        totals[scales] = sum(r.squared_error for r in reports)
        plain = [r for r in reports if r.name not in formats]
        assert all(r.relative_error == 0 and r.bits_per_element == 32 for r in plain)
    assert totals["mse"] < totals["four_over_six"] < totals["max"]


def test_errors_are_those_of_the_matrices_and_name_the_worst_expert():
    model = tiny_model(CONFIG)
    name = "backbone.layers.1.mixer.experts.up_proj"
    with torch.no_grad():
        experts = model.get_parameter(name)
        # One large number in each block leaves no bits for the others: beside it they are zeros.
        experts[3, :, ::16] = 40.0
        experts[3, :, 8::16] = 0.5
    formats = formats_for(model, "nvfp4")
    quantized = quantized_model(model, formats)
    report = next(r for r in matrix_reports(model, quantized, formats) if r.name == name)
    held = quantized.get_submodule(name).dequantize()
    off = (held - experts).double()
    assert report.relative_error == pytest.approx((off.norm() / experts.double().norm()).item())
    errors = off.flatten(1).norm(dim=1) / experts.double().flatten(1).norm(dim=1)
    assert report.worst_expert == int(errors.argmax())
    assert report.worst_expert_error == pytest.approx(errors.max().item())
    assert report.bits_per_element == pytest.approx(4.5 + 32 / (112 * 32))
    bits, elements = total_bits(quantized)
    assert elements == sum(p.numel() for p in model.parameters())
    assert 4.5 < bits < 32 == total_bits(model)[0]


def test_activation_scales_are_the_largest_magnitudes():
    """Of a product's input; of an expert's, those of the tokens that chose it, before its weight
    of the router."""
    model = tiny_model(CONFIG)
    formats = formats_for(model, "mixed")
    batches = [batch_of(CONFIG, 7, 5), batch_of(CONFIG, 3, seed=4)]
    scales = calibrate(model, batches, formats).activations
    assert scales.keys() == formats.keys()
    seen = {}

    def keep(name):
        return lambda _, operands: seen.setdefault(name, []).append(operands)

    names = ("backbone.layers.0.mixer.in_proj", "backbone.layers.1.mixer.experts")
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(keep(name))
    again = calibrate(model, batches, formats).activations
    for name, scale in scales.items():
        assert torch.equal(scale, again[name])
    largest = max(operands[0].abs().max() for operands in seen[names[0]])
    assert scales[f"{names[0]}.weight"].item() == pytest.approx(largest.item() / 448)
    module = model.get_submodule(names[1])
    for expert in range(8):
        rows = torch.cat([x[(r.indices == expert).any(-1)] for x, r in seen[names[1]]])
        if not len(rows):
            continue
        hidden = activate(rows @ module.up_proj[expert].T, "relu2")
        pairs = (("up_proj", rows), ("down_proj", hidden))
        for which, values in pairs:
            expected = values.abs().max().item() / (6 * 448)
            assert scales[f"{names[1]}.{which}"][expert].item() == pytest.approx(expected, rel=1e-5)


def test_an_expert_that_nobody_chose_has_the_scale_of_its_layer():
    model = tiny_model(CONFIG)
    model.routers[0].e_score_correction_bias[2] = -100.0
    scales = calibrate(model, [batch_of(CONFIG, 9)], formats_for(model, "nvfp4"))
    own = scales.activations["backbone.layers.1.mixer.experts.up_proj"]
    assert own[2] == own.max() > 0


def test_the_comparison_is_that_of_whole_distributions():
    model = tiny_model(CONFIG)
    quantized = quantized_model(model, formats_for(model, "nvfp4"))
    batch = batch_of(CONFIG, 6, 5)
    batch.loss_mask[2] = 0
    found = compare(model, quantized, [batch])
    hidden = [
        m(batch.tokens[part].view(1, -1))[0].log_softmax(-1)
        for m in (model, quantized)
        for part in (slice(0, 6), slice(6, 11))
    ]
    p, q = (torch.cat(pair).detach().double() for pair in (hidden[:2], hidden[2:]))
    kept = batch.loss_mask.bool()
    rows = torch.arange(11)[kept]
    assert found.num_tokens == 10
    assert found.original_loss == pytest.approx(
        -p[rows, batch.targets[kept]].mean().item(), rel=1e-5
    )
    assert found.loss == pytest.approx(-q[rows, batch.targets[kept]].mean().item(), rel=1e-5)
    kl = (p.exp() * (p - q)).sum(-1)[kept].mean().item()
    assert found.kl == pytest.approx(kl, rel=1e-3)
    assert found.top1_agreement == pytest.approx(
        (p.argmax(-1) == q.argmax(-1))[kept].double().mean().item()
    )
    same = compare(model, model, [batch])
    assert (same.kl, same.top1_agreement, same.loss) == (0.0, 1.0, same.original_loss)
    with pytest.raises(DataError, match="no held-out token"):
        compare(model, model, [])


def test_a_matrix_that_is_not_finite_is_refused():
    model = tiny_model(CONFIG)
    formats = formats_for(model, "mixed")
    with torch.no_grad():
        model.get_parameter("backbone.layers.4.mixer.experts.up_proj")[5, 0, 0] = torch.nan
    with pytest.raises(
        CheckpointError, match=r"'backbone.layers.4.mixer.experts.up_proj' .* not f"
    ):
        quantized_model(model, formats)


def test_the_quantized_model_is_the_dequantized_one(assert_close):
    model = tiny_model(CONFIG)
    quantized = quantized_model(model, formats_for(model, "mixed"), scales="mse")
    tokens = tokens_for(CONFIG, 2, 12)
    with torch.no_grad():
        assert_close(quantized(tokens), convert_weights(quantized, None)(tokens), FLOAT32)


@pytest.mark.parametrize("config", [CONFIG, qwen_config()], ids=["hybrid", "rotated"])
def test_scales_of_keys_and_values_are_of_what_a_state_holds(config):
    model = tiny_model(config)
    batch = batch_of(config, 11)
    scales = calibrate(model, [batch], {}).keys
    layers = [i for i, each in enumerate(config.layers) if each.symbol == "*"]
    assert list(scales) == [f"backbone.layers.{i}.mixer" for i in layers]
    state = model.new_state(1)
    with torch.no_grad():
        model.hidden_states(batch.tokens, layout=state.layout([11]), state=state)
    held = [state.layers[i] for i in layers]
    for pair, layer in zip(scales.values(), held, strict=True):
        for scale, values in zip(pair, (layer.keys, layer.values), strict=True):
            stored = values.flatten(0, 1)[layer.table.places(
                torch.zeros(11, dtype=torch.long), torch.arange(11))]  # fmt: skip
            assert scale.item() == pytest.approx(stored.abs().max().item() / 448)


def test_the_comparison_can_have_rounded_keys():
    """As prompts of an engine that keeps them so."""
    model = tiny_model(CONFIG)
    batch = batch_of(CONFIG, 6, 5)
    same = compare(model, model, [batch], state=StatePrecision())
    assert same.kl == pytest.approx(0, abs=1e-9)
    narrow = compare(model, model, [batch], state=StatePrecision(keys="float8"))
    assert 1e-7 < narrow.kl < 0.1
    wide = compare(model, model, [batch], state=StatePrecision(keys="bfloat16"))
    assert wide.kl < narrow.kl
