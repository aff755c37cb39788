"""Experts that another pass chose: replayed bit for bit, weighed anew, or refused."""

import dataclasses

import pytest
import torch

from nemotron3.errors import ConfigError
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.routes import RecordedRoutes
from nemotron3.training.optimizers import AdamWConfig, build_optimizer
from nemotron3.training.step import TrainingStep
from tests.tiny import named_gradients, qwen_config, tiny_config, tiny_model, tokens_for
from tests.training.batches import accumulate, documents, pack, pretraining

CONFIGS = {"latent": tiny_config("ME*E-/*E/*E"), "softmax": qwen_config()}
LENGTHS = (5, 1, 9)
every_model = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def output_of(model, tokens, **options):
    layout = SequenceLayout.packed(LENGTHS)
    depths = model.config.pattern.num_mtp_depths
    return model(tokens, layout=layout, head=lambda out: out, mtp_depths=depths, **options)


def results(model, output):
    """Logits of every head, and the gradients of a function of all of them."""
    model.zero_grad()
    logits = [model.logits(hidden) for hidden in output.hidden]
    sum((x * torch.linspace(-1, 1, x.shape[-1])).sum() for x in logits).backward()
    return {str(n): x.detach() for n, x in enumerate(logits)} | named_gradients(model)


def other_choices(model, output, seed=0):
    """Routes that the model would not choose, within the backbone."""
    generator = torch.Generator().manual_seed(seed)
    experts = model.config.moe.n_routed_experts
    return RecordedRoutes(
        backbone=[
            torch.rand(len(r.indices), experts, generator=generator).topk(r.indices.shape[1])[1]
            for r in output.routings
        ]
    )


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # compiled, and not
@pytest.mark.parametrize("recompute", [False, True])
@every_model
def test_a_recorded_pass_is_replayed_bit_for_bit(config, recompute, dtype):
    model = tiny_model(config, dtype=dtype)
    tokens = tokens_for(config, sum(LENGTHS))
    output = output_of(model, tokens)
    routes = output.routes
    wanted = results(model, output)
    for router in model.routers:  # what is replayed does not hang on the bias
        router.e_score_correction_bias.normal_()
    again = output_of(model, tokens, routes=routes, recompute=recompute)
    found = results(model, again)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    for one, two in zip(output.routings, again.routings, strict=True):
        assert torch.equal(one.indices, two.indices)
    chosen = output_of(model, tokens).routings
    assert any(
        not torch.equal(a.indices, b.indices) for a, b in zip(again.routings, chosen, strict=True)
    )


def test_weights_and_gradients_are_those_of_the_scores_at_the_given_experts(assert_close):
    config = CONFIGS["latent"]
    model = tiny_model(config, dtype=torch.float64)
    tokens = tokens_for(config, sum(LENGTHS))
    routes = other_choices(model, output_of(model, tokens))
    replayed = output_of(model, tokens, routes=routes)
    for routing, indices in zip(replayed.routings, routes.backbone, strict=True):
        assert torch.equal(routing.indices, indices)
        scores = routing.scores.gather(1, indices)
        assert_close(routing.weights, 2.5 * scores / scores.sum(-1, keepdim=True), 1e-12)
    gradients = results(model, replayed)
    name = "backbone.layers.1.mixer.gate.weight"
    step, index = 1e-6, (int(routes.backbone[0][3, 0]), 7)
    sums = []
    for sign in (1, -1):
        with torch.no_grad():
            model.get_parameter(name)[index] += sign * step
        sums.append(sum(v.double() for k, v in logit_sums(model, tokens, routes).items()))
        with torch.no_grad():
            model.get_parameter(name)[index] -= sign * step
    assert gradients[name][index].item() == pytest.approx(
        ((sums[0] - sums[1]) / (2 * step)).item(), rel=1e-4, abs=1e-7
    )


def logit_sums(model, tokens, routes):
    output = output_of(model, tokens, routes=routes)
    logits = [model.logits(hidden).detach() for hidden in output.hidden]
    return {n: (x * torch.linspace(-1, 1, x.shape[-1])).sum() for n, x in enumerate(logits)}


def test_compiled_operations_replay_as_the_reference(assert_close):
    config = CONFIGS["latent"]
    tokens = tokens_for(config, sum(LENGTHS))
    exact, single = tiny_model(config, dtype=torch.float64), tiny_model(config)
    routes = other_choices(exact, output_of(exact, tokens))
    wanted = results(exact, output_of(exact, tokens, routes=routes))
    found = results(single, output_of(single, tokens, routes=routes))
    for name in wanted:
        if name.startswith("mtp") or name in ("1", "2"):
            continue  # the depths choose for themselves, and may choose otherwise
        scale = max(1.0, wanted[name].abs().max().item())
        assert_close(found[name].double() / scale, wanted[name] / scale, 1e-4)


def test_depths_choose_for_themselves_unless_their_routes_are_given():
    config = CONFIGS["latent"]
    model = tiny_model(config)
    tokens = tokens_for(config, sum(LENGTHS))
    routes = output_of(model, tokens).routes
    assert routes.mtp is not None
    swapped = RecordedRoutes(backbone=routes.backbone, mtp=routes.mtp[::-1])
    free = output_of(model, tokens, routes=dataclasses.replace(routes, mtp=None))
    given = output_of(model, tokens, routes=swapped)
    for depth, layers in enumerate(free.mtp_routings):
        assert torch.equal(layers[0].indices, routes.mtp[depth][0])
    assert torch.equal(given.mtp_routings[0][0].indices, routes.mtp[1][0])
    assert torch.equal(given.hidden[0], free.hidden[0])
    assert not torch.equal(given.hidden[1], free.hidden[1])


@torch.no_grad()
def test_a_call_that_wants_a_few_outputs_takes_the_routes_of_all_its_tokens(assert_close):
    config = tiny_config("E*E")
    model = tiny_model(config)
    tokens, layout = tokens_for(config, sum(LENGTHS)), SequenceLayout.packed(LENGTHS)
    routes = other_choices(model, output_of(model, tokens)).backbone
    x, rows = model.embed(tokens), torch.tensor([4, 14, 0])
    whole = model.backbone(x, layout, routes=routes)
    some = model.backbone(x, layout, routes=routes, wanted=rows)
    assert_close(some.hidden, whole.hidden[rows], 1e-5)
    assert torch.equal(some.routings[1].indices, routes[1][rows])


@torch.no_grad()
def test_logits_are_replayed_too_and_a_state_goes_on():
    config = tiny_config("ME*E")
    model = tiny_model(config)
    tokens = tokens_for(config, 2, 6)
    output = model(tokens, head=lambda out: out)
    logits, continued = model(tokens), model(tokens, state=model.new_state(2))
    for router in model.routers:
        router.e_score_correction_bias.normal_()
    assert torch.equal(model(tokens, routes=output.routes), logits)
    again = model(tokens, routes=output.routes, state=model.new_state(2))
    assert torch.equal(again, continued)


def test_the_loads_and_biases_count_the_given_experts():
    model = tiny_model("ME")
    batch = pack(documents(30))
    indices = torch.tensor([[0, 1, 2]]).repeat(30, 1)
    batch = dataclasses.replace(batch, routes=RecordedRoutes(backbone=[indices]))
    before = model.routers[0].e_score_correction_bias.clone()
    optimizer = build_optimizer(model, AdamWConfig(lr=1.0))
    step = TrainingStep(
        model, optimizer, pretraining(model), clip_grad_norm=1.0, bias_update_rate=0.5
    )
    metrics = step([batch], learning_rate=0.0)
    moved = model.routers[0].e_score_correction_bias - before
    assert torch.allclose(moved, torch.tensor([-0.5] * 3 + [0.5] * 5))
    assert metrics["moe/max_vio_layer_01"] == pytest.approx(8 / 3 - 1)


def test_recording_then_training_on_the_routes_changes_no_gradient():
    model = tiny_model("ME*-E/*E/*E")
    batch = pack(documents(*LENGTHS))
    wanted = accumulate(model, [batch])
    routes = output_of(model, batch.tokens).routes
    found = accumulate(model, [dataclasses.replace(batch, routes=routes)])
    assert found[0][0].total == wanted[0][0].total
    assert all(torch.equal(found[1][name], gradient) for name, gradient in wanted[1].items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r[:1], r"routes\.backbone has 1 entries; the model has 2 mixtures"),
        (lambda r: [r[0], r[1][:-1]], r"routes\.backbone\[1\] is torch\.int64 of shape \[14, 3\]"),
        (lambda r: [r[0][:, :2], r[1]], r"backbone\[0\] .* of shape \[15, 2\].*\[15, 3\]"),
        (lambda r: [r[0].int(), r[1]], r"backbone\[0\] is torch\.int32 .*must be torch\.int64"),
        (lambda r: [r[0], r[1] + 6], r"backbone\[1\]\[\d+\] is .*different experts from 0 to 7"),
        (lambda r: [r[0] - 8, r[1]], r"backbone\[0\]\[0\] is \[-.*from 0 to 7"),
        (lambda r: [r[0], r[1][:, [0, 1, 0]]], r"backbone\[1\]\[0\] is .*different experts"),
    ],
)
def test_routes_that_cannot_be_are_refused_before_anything_runs(change, message):
    model = tiny_model(CONFIGS["latent"])
    tokens = tokens_for(model.config, sum(LENGTHS))
    routes = output_of(model, tokens).routes
    ran = []
    model.backbone.embeddings.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(ConfigError, match=message):
        output_of(model, tokens, routes=RecordedRoutes(backbone=change(routes.backbone)))
    assert not ran


def test_routes_of_other_depths_are_refused():
    model = tiny_model(CONFIGS["latent"])
    tokens = tokens_for(model.config, sum(LENGTHS))
    routes = output_of(model, tokens).routes
    with pytest.raises(ConfigError, match=r"routes\.mtp has 1 depths and mtp_depths is 2"):
        output_of(model, tokens, routes=dataclasses.replace(routes, mtp=routes.mtp[:1]))
    with pytest.raises(ConfigError, match=r"routes\.mtp\[0\] has 0 entries"):
        output_of(model, tokens, routes=dataclasses.replace(routes, mtp=[[], []]))


def test_depths_that_the_model_has_not_are_refused():
    with pytest.raises(ConfigError, match="mtp_depths is 1; a model without an MTP block"):
        tiny_model("M")(torch.zeros(1, 3, dtype=torch.int64), head=lambda out: out, mtp_depths=1)
