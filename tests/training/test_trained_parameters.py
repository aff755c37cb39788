"""What is trained, counted by part."""

from nemotron3.models.costs import model_costs
from nemotron3.models.lora import LoRAConfig, add_lora
from nemotron3.training.parameter_groups import ParameterGroupConfig, freeze_parameters
from nemotron3.training.trained_parameters import trained_by_part, trained_text
from tests.tiny import tiny_config, tiny_model

PATTERN = "MEM*E-/*E/*E"


def test_all_parameters_are_trained_and_counted_once():
    model = tiny_model(PATTERN)
    counts, costs = trained_by_part(model), model_costs(model.config)
    assert all(count.trained == count.total for count in counts.values())
    names = {"mlp": "dense feed-forward"}
    expected = costs.parameters | {"multi-token prediction": costs.mtp_parameters}
    assert {names.get(p, p): c.total for p, c in counts.items()} == expected


def test_an_adapter_is_what_is_trained():
    model = tiny_model(PATTERN)
    before = {part: count.total for part, count in trained_by_part(model).items()}
    config = tiny_config(PATTERN)
    add_lora(model, LoRAConfig(rank=2, targets=("q_proj", "experts.up_proj")), seed=0)
    counts = trained_by_part(model)
    assert {part: count.total for part, count in counts.items()} == before
    trained = {part: count.trained for part, count in counts.items() if count.trained}
    experts, width, hidden = 8, 32, 24
    queries = 2 * (config.hidden_size + 80)
    assert trained == {
        "attention": queries,
        "routed experts": 2 * experts * 2 * (width + hidden),
        "multi-token prediction": queries + experts * 2 * (width + hidden),
    }
    text = trained_text(model)
    assert f"Trained are {sum(trained.values()):,} parameters" in text
    assert "router                          frozen of 1,024" in text


def test_frozen_groups_are_said():
    model = tiny_model(PATTERN)
    routers = ParameterGroupConfig(name="r", parameters=("*.gate.weight",), is_frozen=True)
    freeze_parameters(model, [routers])
    assert trained_by_part(model)["router"][:2] == (0, 2 * 8 * 64)
