"""The masked, weighted loss: one number for a global batch, however it is cut and packed."""

import pytest
import torch
from torch.nn import functional as F

from nemotron3.errors import ConfigError
from nemotron3.models.layout import SequenceLayout
from nemotron3.training.token_objective import TokenLossConfig, TokenObjective
from tests.tiny import tiny_model
from tests.tolerances import FLOAT64
from tests.training.batches import accumulate, assert_same, documents, forward, pack

PATTERN = "ME*-E/*E/*E"
LENGTHS = (5, 16, 1, 2, 9, 8, 3, 20)
CUTS = {
    "one, another order": [[7, 0, 3, 1, 6, 2, 5, 4]],
    "two": [range(4), range(4, 8)],
    "two uneven": [range(7), range(7, 8)],
    "four": [range(2), range(2, 4), range(4, 6), range(6, 8)],
    "each alone": [[n] for n in range(8)],
}
every_normalisation = pytest.mark.parametrize("normalisation", ["token", "sequence"])


def objective_of(model, normalisation="token", mtp=0.3):
    config = TokenLossConfig(normalisation=normalisation, mtp_loss_scaling=mtp)
    return TokenObjective(config, num_mtp_depths=model.config.pattern.num_mtp_depths)


def conversations():
    """Documents with prompts that are not trained, one of them wholly, and advantages."""
    generator = torch.Generator().manual_seed(5)
    masks = [(torch.rand(n, generator=generator) > 0.4).float() for n in LENGTHS]
    masks[3].zero_()
    weights = [torch.randn(n, generator=generator) for n in LENGTHS]
    return documents(*LENGTHS), masks, weights


def packed(pieces, parts, masks, weights):
    return [
        pack(
            [parts[n] for n in piece],
            torch.cat([masks[n] for n in piece]),
            torch.cat([weights[n] for n in piece]),
        )
        for piece in pieces
    ]


@pytest.mark.parametrize("mtp", [0.0, 0.3])
@every_normalisation
@pytest.mark.parametrize("cut", CUTS)
def test_any_cut_and_packing_gives_the_same_loss_and_gradients(
    assert_close, cut, normalisation, mtp
):
    model = tiny_model(PATTERN, dtype=torch.float64)
    objective, data = objective_of(model, normalisation, mtp), conversations()
    whole = accumulate(model, packed([range(8)], *data), objective)
    assert whole[1]["backbone.embeddings.weight"].any()
    assert whole[1]["mtp.input.eh_proj.weight"].any() == (mtp > 0)
    assert_same(assert_close, accumulate(model, packed(CUTS[cut], *data), objective), whole, 1e-7)


@pytest.mark.parametrize("depth", [0, 1, 2])
@every_normalisation
def test_the_loss_is_the_weighted_mean_written_out(assert_close, normalisation, depth):
    """By logits and a loop over sequences and tokens."""
    model = tiny_model(PATTERN, dtype=torch.float64)
    parts, masks, weights = conversations()
    (batch,) = packed([range(8)], parts, masks, weights)
    output = model(
        batch.tokens,
        layout=SequenceLayout(batch.segments),
        head=lambda output: output,
        mtp_depths=2,
    )
    losses = (
        F.cross_entropy(
            model.logits(output.hidden[depth]), batch.at_depth(depth).targets, reduction="none"
        )
        .detach()
        .split(LENGTHS)
    )
    sums, tokens, means = 0.0, 0, []
    for loss, mask, weight in zip(losses, masks, weights, strict=True):
        places = [i for i in range(len(mask) - depth) if mask[i + depth]]
        total = sum(float(weight[i + depth]) * float(loss[i]) for i in places)
        sums, tokens = sums + total, tokens + len(places)
        if places:
            means.append(total / len(places))
    wanted = sums / tokens if normalisation == "token" else sum(means) / len(means)
    term = forward(model, batch, objective_of(model, normalisation))
    name = "train/loss" if depth == 0 else f"train/loss_mtp_{depth}"
    assert term.metrics[name].item() == pytest.approx(wanted, rel=1e-6)


def test_the_total_weighs_all_depths_together():
    model = tiny_model(PATTERN)
    term = forward(model, pack(documents(*LENGTHS)), objective_of(model, mtp=0.5))
    one, two = (term.metrics[f"train/loss_mtp_{depth}"] for depth in (1, 2))
    assert term.total.item() == pytest.approx(
        (term.metrics["train/loss"] + 0.25 * (one + two)).item()
    )


@every_normalisation
def test_the_gradient_is_linear_in_the_weights(assert_close, normalisation):
    """What negative weights mean: the gradient of -w is minus that of w, and 0 is none."""
    model = tiny_model(PATTERN, dtype=torch.float64)
    parts, masks, weights = conversations()
    objective = objective_of(model, normalisation)

    def gradients(factor):
        scaled = [factor * weight for weight in weights]
        return accumulate(model, packed([range(8)], parts, masks, scaled), objective)[1]

    once, minus_twice, none = gradients(1.0), gradients(-2.0), gradients(0.0)
    for name, gradient in once.items():
        assert_close(minus_twice[name], -2 * gradient, FLOAT64)
        assert not none[name].any()


@every_normalisation
def test_weights_of_zero_count_and_masked_tokens_do_not(normalisation):
    model = tiny_model("M*")
    parts = documents(6)
    objective = objective_of(model, normalisation, mtp=0.0)
    half = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    masked = forward(model, pack(parts, half), objective).total
    weighted = forward(model, pack(parts, weights=half), objective).total
    assert masked.item() == pytest.approx(2 * weighted.item())


@every_normalisation
def test_a_batch_without_a_trained_token_has_loss_and_gradient_zero(normalisation):
    model = tiny_model(PATTERN)
    empty = pack(documents(6, 5), torch.zeros(11), torch.randn(11))
    terms, gradients = accumulate(model, [empty, empty], objective_of(model, normalisation))
    assert all(term.total == 0 for term in terms)
    assert not any(value.any() for term in terms for value in term.metrics.values())
    assert not any(gradient.any() for gradient in gradients.values())


@every_normalisation
def test_a_microbatch_without_a_trained_token_changes_nothing(assert_close, normalisation):
    model = tiny_model(PATTERN, dtype=torch.float64)
    objective, data = objective_of(model, normalisation), conversations()
    batches = packed([range(8)], *data)
    whole = accumulate(model, batches, objective)
    empty = pack(documents(4, seed=9), torch.zeros(4))
    assert_same(assert_close, accumulate(model, [empty, *batches], objective), whole, FLOAT64)


def test_one_short_conversation_weighs_as_much_as_a_long_one():
    model = tiny_model("M*", dtype=torch.float64)
    objective = objective_of(model, "sequence", mtp=0.0)
    short, long = documents(1, 40)
    alone = [forward(model, pack([part]), objective).total.item() for part in (short, long)]
    both = forward(model, pack([short, long]), objective).total.item()
    assert both == pytest.approx(sum(alone) / 2)
    assert objective.counts(pack([short, long])) == {"targets": 2.0}


def test_weights_of_a_depth_are_those_of_the_tokens_it_predicts():
    parts = documents(4, 3)
    batch = pack(parts, weights=torch.arange(7.0))
    assert batch.at_depth(1).weights.tolist() == [1, 2, 3, 0, 5, 6, 0]
    assert batch.at_depth(2).weights.tolist() == [2, 3, 0, 0, 6, 0, 0]


def test_a_scaling_that_would_do_nothing_or_harm_is_refused():
    with pytest.raises(ConfigError, match=r"mtp_loss_scaling is 0\.3 and the model has no MTP"):
        TokenObjective(TokenLossConfig(mtp_loss_scaling=0.3), num_mtp_depths=0)
    with pytest.raises(ConfigError, match=r"mtp_loss_scaling is -1\.0; it must be 0 or more"):
        TokenLossConfig(mtp_loss_scaling=-1.0)
