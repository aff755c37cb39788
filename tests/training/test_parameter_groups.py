"""Groups of parameters by name: their members, and invalid groups."""

import pytest

from nemotron3.config import from_record, to_record
from nemotron3.errors import ConfigError
from nemotron3.models.precision import convert_weights
from nemotron3.training.optimizers import (
    AdamWConfig,
    build_optimizer,
    parameter_groups,
    set_learning_rate,
)
from nemotron3.training.parameter_groups import (
    ParameterGroupConfig,
    freeze_parameters,
    group_of_parameters,
)
from tests.tiny import tiny_model

PATTERN = "ME*/*E"


def group(name, *parameters, **settings):
    return ParameterGroupConfig(name=name, parameters=parameters, **settings)


def settings_by_name(model, groups):
    """Learning rate at 1.0 and decay of every parameter that is optimized."""
    optimizer = build_optimizer(model, AdamWConfig(lr=1.0, weight_decay=0.1), groups)
    set_learning_rate(optimizer, 1.0)
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (held["lr"], held["weight_decay"])
        for held in optimizer.param_groups
        for p in held["params"]
    }


def test_each_parameter_has_the_rate_and_the_decay_of_its_group():
    model = tiny_model(PATTERN)
    groups = (
        group("mtp", "mtp.*", lr_scale=0.5, weight_decay=0.3),
        group("head", "lm_head.weight", "backbone.embeddings.*", lr_scale=2.0),
    )
    found = settings_by_name(model, groups)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    assert found["mtp.input.eh_proj.weight"] == (0.5, 0.3)
    assert found["mtp.final_layernorm.weight"] == (0.5, 0.0)
    assert found["lm_head.weight"] == found["backbone.embeddings.weight"] == (2.0, 0.1)
    assert found["backbone.layers.0.mixer.in_proj.weight"] == (1.0, 0.1)
    assert found["backbone.layers.0.norm.weight"] == (1.0, 0.0)


def test_quantized_weights_are_refused():
    with pytest.raises(ConfigError, match="kept in int8, which has no gradients"):
        build_optimizer(convert_weights(tiny_model(PATTERN), "int8"), AdamWConfig(lr=1.0))


def test_frozen_parameters_are_not_optimized():
    model = tiny_model(PATTERN)
    groups = (group("router", "*.gate.weight", is_frozen=True),)
    freeze_parameters(model, groups)
    found = settings_by_name(model, groups)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if "gate" in name}
    assert len(frozen) == 2
    assert not found.keys() & frozen


def test_a_group_whose_parameters_are_frozen_otherwise_leaves_no_empty_group():
    model = tiny_model(PATTERN)
    for parameter in model.mtp.parameters():
        parameter.requires_grad = False
    assert all(g["params"] for g in parameter_groups(model, 0.1, [group("mtp", "mtp.*")]))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([group("a", "mpt.*")], r"no parameter fits 'mpt\.\*' of parameter group 'a'"),
        (
            [group("a", "mtp.*"), group("b", "*.eh_proj.*")],
            r"'mtp\.input\.eh_proj\.weight' is in the groups 'a' and 'b'",
        ),
        ([group("a", "mtp.*"), group("a", "lm_head.*")], "two parameter groups are called 'a'"),
    ],
)
def test_groups_that_do_not_fit_the_model_are_refused(groups, message):
    with pytest.raises(ConfigError, match=message):
        group_of_parameters(tiny_model(PATTERN), groups)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ""}, "needs a name"),
        ({"parameters": ()}, "at least one pattern"),
        ({"lr_scale": 0.0}, r"lr_scale of parameter group 'a' is 0\.0.*is_frozen"),
        ({"lr_scale": float("nan")}, "lr_scale .* is nan"),
        ({"weight_decay": -1.0}, r"weight_decay .* is -1\.0"),
        ({"is_frozen": True, "lr_scale": 0.1}, "is frozen and has lr_scale"),
        ({"is_frozen": True, "weight_decay": 0.1}, "would do nothing"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        ParameterGroupConfig(**{"name": "a", "parameters": ("*",)} | fields)


def test_the_configuration_is_recorded():
    config = group("a", "mtp.*", weight_decay=0.0)
    assert from_record(ParameterGroupConfig, to_record(config)) == config
