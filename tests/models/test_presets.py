"""The published sizes, counted tensor by tensor without allocating one."""

import pytest
import torch

from nemotron3.errors import ConfigError
from nemotron3.models.config import ModelConfig
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.presets import PRESETS


def parameters(name):
    with torch.device("meta"):
        model = LanguageModel(ModelConfig.preset(name))
    sizes = {key: tensor.numel() for key, tensor in model.named_parameters()}
    mtp = sum(size for key, size in sizes.items() if key.startswith("mtp."))
    return sum(sizes.values()) - mtp, mtp


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("nano", 31_577_937_344),
        ("super", 120_668_687_360),
        ("ultra", 549_308_968_960),
        ("qwen3-moe", 30_532_122_624),
    ],
)
def test_parameters_without_prediction_heads_are_the_published_total(name, total):
    assert parameters(name)[0] == total


def test_one_physical_prediction_block_serves_both_depths():
    assert parameters("nano")[1] == 0
    assert parameters("super")[1] == pytest.approx(2.94e9, rel=0.002)
    assert parameters("ultra")[1] == pytest.approx(11.2e9, rel=0.003)


@pytest.mark.parametrize(
    ("name", "layers"),
    [("nano", (52, 23, 23, 6)), ("super", (88, 40, 40, 8)), ("ultra", (108, 48, 48, 12))],
)
def test_layers_of_each_kind(name, layers):
    main = str(ModelConfig.preset(name).pattern).split("/")[0]
    assert (len(main), *(main.count(kind) for kind in "ME*")) == layers


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds(name):
    assert ModelConfig.preset(name).num_layers > 0


def test_an_unknown_preset_names_the_nearest_and_all():
    with pytest.raises(ConfigError, match=r"no preset 'supper' \(did you mean 'super'\?\).*ultra"):
        ModelConfig.preset("supper")
    with pytest.raises(ConfigError, match="no preset 'gpt'; presets are tiny, small, nano"):
        ModelConfig.preset("gpt")


def test_presets_are_not_changed_by_reading_them():
    assert ModelConfig.preset("tiny") == ModelConfig.preset("tiny")
