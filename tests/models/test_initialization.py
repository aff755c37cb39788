"""Initial weights: the spread of every group, by the rule that docs and sources give."""

import math

import pytest
import torch
from torch import nn

from nemotron3.errors import ConfigError
from nemotron3.models import initialization
from nemotron3.models.initial_values import Elements, InitialScale
from nemotron3.models.initialization import initialize
from nemotron3.models.linear import Linear
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.parameter import parameter_specs
from tests.tiny import qwen_config, tiny_config

PATTERN = "MEM*E-/*E/*E"


@pytest.fixture(scope="module")
def model():
    config = tiny_config(
        PATTERN,
        vocab_size=512,
        hidden_size=128,
        mamba={"mamba_num_heads": 64, "n_groups": 2},
        moe={"moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 96},
    )
    return LanguageModel.from_config(config, seed=1)


WRITES_TO_THE_STREAM = ("out_proj", "o_proj", "down_proj", "fc2_latent_proj")
OWN_RULE = ("A_log", "D", "dt_bias", "conv1d", "norm")


def test_matrices_are_normal_and_those_that_write_to_the_stream_smaller(model):
    std, layers = model.config.init_std, 6
    assert std == pytest.approx(math.sqrt(0.8 / 128))
    seen = set()
    for name, tensor in model.named_parameters():
        if any(part in name for part in OWN_RULE):
            continue
        writes = any(part in name for part in WRITES_TO_THE_STREAM)
        seen.add(name.split(".")[-2 if name.endswith("weight") else -1])
        expected = std / math.sqrt(layers) if writes else std
        # Four standard errors of a sample standard deviation.
        slack = 4 / math.sqrt(2 * tensor.numel())
        assert tensor.std().item() == pytest.approx(expected, rel=slack), name
        assert tensor.mean().abs() < 4 * expected / math.sqrt(tensor.numel()), name
    assert seen == {
        *WRITES_TO_THE_STREAM,
        *("embeddings", "lm_head", "in_proj", "q_proj", "k_proj", "v_proj", "up_proj"),
        *("fc1_latent_proj", "gate", "eh_proj"),
    }


def test_the_scan_starts_in_its_published_ranges(model):
    mixers = [layer.mixer for layer in model.backbone.layers if layer.kind.symbol == "M"]
    for mixer in mixers:
        A, dt = mixer.A_log.exp(), torch.nn.functional.softplus(mixer.dt_bias)
        assert A.min() >= 1
        assert A.max() <= 16
        assert 6 < A.mean() < 11  # uniform in A, not in its logarithm (which would give 5.4)
        assert dt.min() >= 0.000999
        assert dt.max() <= 0.1001
        assert 0.006 < dt.log().mean().exp() < 0.016  # log-uniform: the middle is 0.01
        assert torch.equal(mixer.D, torch.ones_like(mixer.D))
        assert mixer.conv1d.weight.abs().max() <= 0.5
        assert mixer.conv1d.weight.std().item() == pytest.approx(0.5 / math.sqrt(3), rel=0.1)
        assert mixer.conv1d.bias.abs().max() <= 0.5
        assert mixer.conv1d.bias.std() > 0.2


def test_steps_are_raised_to_the_floor():
    config = tiny_config(
        "M", mamba={"time_step_min": 1e-6, "time_step_max": 1e-5, "time_step_floor": 1e-3}
    )
    mixer = LanguageModel.from_config(config).backbone.layers[0].mixer
    steps = torch.nn.functional.softplus(mixer.dt_bias)
    assert torch.allclose(steps, torch.full_like(steps, 1e-3), rtol=1e-4)


def test_norms_start_at_one_and_selection_biases_at_zero(model):
    for name, tensor in model.state_dict().items():
        if "norm" in name:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        if name.endswith("e_score_correction_bias"):
            assert torch.equal(tensor, torch.zeros_like(tensor)), name


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("config", [tiny_config(PATTERN), qwen_config()], ids=["hybrid", "qwen"])
def test_nothing_is_left_uninitialised_and_seeds_decide(config):
    first, again, other = (LanguageModel.from_config(config, seed=s) for s in (3, 3, 4))
    for (name, a), b, c in zip(
        first.state_dict().items(),
        again.state_dict().values(),
        other.state_dict().values(),
        strict=True,
    ):
        assert torch.isfinite(a).all(), name
        assert torch.equal(a, b), name
        if a.unique().numel() > 1:
            assert not torch.equal(a, c), name


def test_the_global_seed_is_neither_read_nor_moved():
    torch.manual_seed(5)
    first = LanguageModel.from_config(tiny_config("ME"))
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)
    torch.manual_seed(6)
    second = LanguageModel.from_config(tiny_config("ME"))
    assert torch.equal(first.output_weight, second.output_weight)


def test_in_bfloat16_the_scan_and_the_selection_bias_stay_float32():
    model = LanguageModel.from_config(tiny_config(), dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        wide = name.endswith(("A_log", "D", "dt_bias", "e_score_correction_bias", "gate.weight"))
        assert tensor.dtype == (torch.float32 if wide else torch.bfloat16), name


def test_a_name_decides_and_not_the_layers_around_it():
    """The same names in a model with other layers behind, a wider vocabulary, and the seed."""
    first = LanguageModel.from_config(tiny_config("MEM*E", initializer_range=0.02), seed=9)
    other = LanguageModel.from_config(
        tiny_config("MEM*EM-E/*E", initializer_range=0.02, vocab_size=197), seed=9
    )
    others = dict(other.named_parameters())
    shared = 0
    for name, tensor in first.named_parameters():
        theirs = others[name]
        if tensor.unique().numel() == 1:
            continue
        if name.endswith(("down_proj", "down_proj.weight", "out_proj.weight", "o_proj.weight",
                          "fc2_latent_proj.weight")):  # fmt: skip
            theirs = theirs * math.sqrt(8 / 5)  # of as many layers they are
        assert torch.allclose(tensor, theirs[: len(tensor)], rtol=1e-6), name
        shared += 1
    assert shared > 20
    layers = first.backbone.layers
    assert not torch.equal(layers[0].mixer.in_proj.weight, layers[2].mixer.in_proj.weight)
    assert not torch.equal(layers[0].mixer.A_log, layers[2].mixer.A_log)


def test_a_part_of_a_parameter_is_drawn_without_the_rest(model):
    """Rows of every matrix as a process that holds these rows draws them."""
    scale = InitialScale(model.config.init_std, model.config.init_std / math.sqrt(6))
    for name, tensor in model.state_dict().items():
        spec = parameter_specs(model)[name]
        row = tensor[0].numel()
        for first, last in ((0, 1), (len(tensor) // 3, len(tensor))):
            part = Elements(1, name, first * row, last * row, tensor.device)
            assert torch.equal(spec.init(part, scale), tensor[first:last].flatten()), name


def test_chunks_leave_no_seam(monkeypatch):
    config = tiny_config("ME")
    whole = LanguageModel.from_config(config, seed=2)
    monkeypatch.setattr(initialization, "_CHUNK", 1001)
    chunked = LanguageModel.from_config(config, seed=2)
    for (name, a), b in zip(whole.state_dict().items(), chunked.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_have_the_same_values_rounded(dtype):
    wide = LanguageModel.from_config(tiny_config(PATTERN), seed=5)
    other = LanguageModel.from_config(tiny_config(PATTERN), seed=5, dtype=dtype)
    for (name, a), b in zip(wide.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a.to(b.dtype), b), name


def test_a_parameter_that_nobody_declares_is_refused():
    config = tiny_config("M")
    model = nn.Sequential(Linear(3, 2), nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"parameter '1\.weight' has no declared initial value"):
        initialize(model, config, 0)
