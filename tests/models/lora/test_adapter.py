"""Adapters in memory: what they compute, what they train, and how they are merged."""

import copy

import pytest
import torch
from torch.func import functional_call

from nemotron3.errors import ConfigError
from nemotron3.inference.model_runner import ModelRunner
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.lora import (
    LoRAConfig,
    adapter_of,
    add_lora,
    load_adapter,
    merge_adapter,
    merge_into,
    shared_model,
    trained_tensors,
)
from nemotron3.models.lora.adapter import products
from tests.models.lora.adapted import EVERYTHING, PATTERN, adapted_model, with_change
from tests.tiny import qwen_config, tiny_config, tiny_model, tokens_for
from tests.tolerances import DECODE, FLOAT32, FLOAT64

MODELS = {
    "whole": tiny_config(PATTERN),
    "wide experts": tiny_config("ME*E", moe={"moe_latent_size": None}),
    "transformer": qwen_config(),
    "tied": tiny_config("M*-", tie_word_embeddings=True),
}
every_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
ALL = LoRAConfig(rank=3, alpha=7.0)


@every_model
@torch.no_grad()
def test_a_new_adapter_changes_no_bit(config):
    model = tiny_model(config)
    tokens = tokens_for(config, 2, 19)
    logits = model(tokens)
    add_lora(model, ALL, seed=0)
    assert torch.equal(model(tokens), logits)


def loss_of(logits, *depths):
    return sum((part.square() * torch.linspace(-1, 1, part.shape[-1])).mean() for part in logits)


def head(output):
    return [hidden @ output.output_weight.T for hidden in output.hidden]


def lengths_of(count):
    return SequenceLayout.packed([count - 8, 1, 7])


@every_model
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_the_definition(config, recompute):
    """Of A and B alone, against autograd of W + scale B A by einsum, in float64."""
    model = tiny_model(config).double()
    tokens = tokens_for(config, 27)
    depths = config.pattern.num_mtp_depths
    if config.moe is not None:
        for router in model.routers:  # an expert that no token chooses
            router.e_score_correction_bias[2] = -100.0
    plain = copy.deepcopy(model)
    targets = ("all-linear",) if config.tie_word_embeddings else EVERYTHING.targets
    targets = tuple(t for t in targets if config.mamba is not None or t != "out_proj")
    add_lora(model, LoRAConfig(rank=3, alpha=7.0, targets=targets), seed=0)
    with_change(model.double())
    options = {"layout": lengths_of(27), "head": head, "mtp_depths": depths}
    loss_of(model(tokens, recompute=recompute, **options)).backward()

    leaves, weights = {}, dict(plain.named_parameters())
    places = products(plain)
    for name, change in adapter_of(model).items():
        place = name if name in weights else f"{name}.weight"
        A, B = (t.clone().requires_grad_() for t in (change.A, change.B))
        leaves[name] = A, B
        assert places[name].weight is weights[place]
        product = torch.einsum("...or,...ri->...oi", B, A)
        weights[place] = weights[place].detach() + 7.0 / 3 * product
    loss_of(functional_call(plain, weights, (tokens,), options)).backward()

    found = products(model)
    for name, (A, B) in leaves.items():
        weight = found[name].weight
        for ours, theirs in ((weight.A.grad, A.grad), (weight.B.grad, B.grad)):
            assert (ours - theirs).abs().max() <= FLOAT64 * max(theirs.abs().max(), 1e-3), name
        if ".experts." in name:
            assert not weight.A.grad[2].any()
            assert weight.A.grad.any()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == trained_tensors(model).keys()
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)


@every_model
@torch.no_grad()
def test_merged_and_unmerged_are_equal(config):
    base = tiny_model(config)
    tokens = tokens_for(config, 2, 19)
    before = base(tokens)
    model = copy.deepcopy(base)
    add_lora(model, ALL, seed=0)
    with_change(model)
    adapted = model(tokens)
    assert (adapted - before).abs().max() > 0.1
    merged = copy.deepcopy(base)
    merge_adapter(merged, adapter_of(model))
    assert torch.equal(merged(tokens), adapted)
    served = shared_model(base, adapter_of(model))
    assert torch.equal(served(tokens), adapted)
    assert torch.equal(shared_model(model)(tokens), adapted)
    assert torch.equal(base(tokens), before)
    assert torch.equal(shared_model(model, {})(tokens), before)


def test_a_shared_model_has_memory_of_its_own_for_changed_weights_alone():
    base = tiny_model(PATTERN)
    adapter = adapter_of(
        adapted_model(lora=LoRAConfig(rank=3, targets=("q_proj", "experts.up_proj")))
    )
    served = shared_model(base, adapter)
    ours = {name: t.data_ptr() for name, t in served.state_dict().items()}
    own = {name for name, t in base.state_dict().items() if t.data_ptr() != ours[name]}
    assert own == {name if name in ours else f"{name}.weight" for name in adapter}
    assert ours.keys() == base.state_dict().keys()


@torch.no_grad()
def test_bfloat16_weights_are_rounded_once():
    base = tiny_model(PATTERN, dtype=torch.bfloat16)
    model = copy.deepcopy(base)
    add_lora(model, EVERYTHING, seed=0)
    with_change(model)
    assert all(p.dtype == torch.float32 for p in trained_tensors(model).values())
    tokens = tokens_for(base.config, 2, 9)
    assert torch.equal(shared_model(model)(tokens), model(tokens))
    model.to(torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in trained_tensors(model).values())


@torch.inference_mode()
def test_recorded_steps_follow_the_adapter(assert_close):
    """Steps recorded before an update replay with the weights after it."""
    model = adapted_model()
    tokens = tokens_for(model.config, 3, 21)
    served = shared_model(model)
    runner = ModelRunner(served, served.new_state(3))

    def decoded():
        for slot in range(3):
            runner.cache.free(slot)
        return torch.cat(
            [runner.decode(p.tolist(), [0, 1, 2]).logits.clone() for p in tokens.split(1, 1)], 1
        )

    first = decoded()
    assert_close(first, model(tokens), DECODE)
    with_change(model, seed=1)
    addresses = [t.data_ptr() for t in served.state_dict().values()]
    merge_into(served, model)
    assert addresses == [t.data_ptr() for t in served.state_dict().values()]
    second = decoded()
    assert_close(second, model(tokens), DECODE)
    assert (second - first).abs().max() > 0.1


@torch.inference_mode()
def test_a_model_with_an_adapter_can_be_stepped_itself(assert_close):
    model = adapted_model()
    tokens = tokens_for(model.config, 2, 9)
    runner = ModelRunner(model, model.new_state(2))
    steps = [runner.decode(part.tolist(), [0, 1]).logits.clone() for part in tokens.split(1, 1)]
    assert_close(torch.cat(steps, 1), model(tokens), DECODE)


def test_initial_values_depend_on_seed_and_name_alone():
    one, other = (adapter_of(_new(targets)) for targets in (("all-linear",), ("q_proj", "k_proj")))
    for name, change in other.items():
        assert torch.equal(change.A, one[name].A)
        assert not change.B.any()
        bound = change.A.shape[-1] ** -0.5
        assert change.A.abs().max() <= bound
        assert change.A.std() > bound / 3
    again = adapter_of(_new(("q_proj",), seed=1))
    assert all(not torch.equal(change.A, one[name].A) for name, change in again.items())


def _new(targets, seed=0):
    model = tiny_model(PATTERN)
    add_lora(model, LoRAConfig(rank=3, targets=targets), seed=seed)
    return model


def test_loading_takes_the_values_of_another_adapter():
    model, other = adapted_model(seed=0), adapted_model(seed=1)
    load_adapter(model, adapter_of(other))
    tokens = tokens_for(model.config, 1, 9)
    assert torch.equal(model(tokens), other(tokens))


@pytest.mark.parametrize(
    ("targets", "chosen"),
    [
        (("q_proj",), ["backbone.layers.3.mixer.q_proj", "mtp.layers.0.mixer.q_proj"]),
        (("layers.0.mixer.in_proj",), ["backbone.layers.0.mixer.in_proj"]),
        (("backbone.layers.1.*.down_proj",), None),
        (("lm_head", "out_proj"), None),
        (("backbone.layers.1.mixer.experts.*",), None),
    ],
)
def test_targets_are_ends_of_names_or_patterns(targets, chosen):
    names = list(adapter_of(_new(targets)))
    expected = {
        ("backbone.layers.1.*.down_proj",): [
            "backbone.layers.1.mixer.experts.down_proj",
            "backbone.layers.1.mixer.shared_experts.down_proj",
        ],
        ("lm_head", "out_proj"): [
            "backbone.layers.0.mixer.out_proj",
            "backbone.layers.2.mixer.out_proj",
            "lm_head",
        ],
        ("backbone.layers.1.mixer.experts.*",): [
            "backbone.layers.1.mixer.experts.up_proj",
            "backbone.layers.1.mixer.experts.down_proj",
        ],
    }
    assert names == (chosen or expected[targets])


def test_experts_are_named_as_shared_ones_are():
    """`up_proj` alone means all of them: a name that skips most weights in silence is a trap."""
    names = set(adapter_of(_new(("up_proj",))))
    ends = ("mixer.experts.up_proj", "shared_experts.up_proj", "5.mixer.up_proj")
    assert {end for end in ends if any(name.endswith(end) for name in names)} == set(ends)
    assert all("shared" not in name for name in adapter_of(_new(("experts.up_proj",))))


def test_all_linear_is_every_product_of_layers():
    left_out = products(tiny_model(PATTERN)).keys() - adapter_of(_new(("all-linear",))).keys()
    assert left_out == {"lm_head", *(f"backbone.layers.{i}.mixer.out_proj" for i in (0, 2))}


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("inproj", "the closest are in_proj"),
        ("experts.up", "experts.up_proj"),
        ("gate", "which names no product"),
        ("embeddings", "routers, norms and embeddings are never adapted"),
    ],
)
def test_a_target_without_a_product_names_the_closest(target, said):
    with pytest.raises(ConfigError, match=said):
        _new(("q_proj", target))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rank": 0}, "rank is 0; it must be 1 or more"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"targets": ()}, "name products"),
        ({"targets": ("",)}, "name products"),
    ],
)
def test_wrong_values_are_refused(values, said):
    with pytest.raises(ConfigError, match=said):
        LoRAConfig(**values)


def test_what_cannot_be_adapted_or_saved_is_refused(tmp_path):
    model = tiny_model(PATTERN)
    add_lora(model, ALL, seed=0)
    with pytest.raises(ConfigError, match="an adapter already"):
        add_lora(model, ALL, seed=0)
    with pytest.raises(ConfigError, match="save shared_model"):
        model.save_pretrained(tmp_path)


def test_a_copy_is_a_model_with_the_same_adapter():
    model = adapted_model()
    tokens = tokens_for(model.config, 1, 9)
    assert torch.equal(copy.deepcopy(model)(tokens), model(tokens))


@torch.no_grad()
def test_the_backends_agree_on_adapted_experts(assert_close):
    """Float64 takes PyTorch's operations, float32 the compiled ones where they are."""
    model = adapted_model()
    tokens = tokens_for(model.config, 2, 19)
    logits = model(tokens)
    assert_close(logits.double(), copy.deepcopy(model).double()(tokens), 10 * FLOAT32)
