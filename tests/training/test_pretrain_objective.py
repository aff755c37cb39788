"""The loss is one number for a global batch, however the batch is cut, packed or computed."""

import pytest
import torch

from nemotron3.errors import ConfigError
from nemotron3.training.balancing import sequence_balance_loss
from nemotron3.training.pretrain_objective import PretrainLossConfig
from tests.tiny import tiny_config, tiny_model
from tests.tolerances import FLOAT32, FLOAT64
from tests.training.batches import accumulate, assert_same, documents, forward, pack, pretraining

# A strong balance loss, so that an error in it cannot hide behind the cross-entropy.
STRONG = {"balance_loss": 0.5}
LENGTHS = (5, 16, 1, 2, 9, 8, 3, 20)
CUTS = {
    "one": [range(8)],
    "two": [range(4), range(4, 8)],
    "two uneven": [range(7), range(7, 8)],
    "four": [range(2), range(2, 4), range(4, 6), range(6, 8)],
    "four, one without far targets": [range(2), range(2, 4), range(4, 5), range(5, 8)],
    "each alone": [[n] for n in range(8)],
    "another order": [[7, 0, 3], [1, 6, 2, 5, 4]],
}


@pytest.mark.parametrize("cut", list(CUTS)[1:])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, FLOAT64), (torch.float32, FLOAT32)],
    ids=["float64", "float32"],
)
def test_any_cut_into_microbatches_gives_the_same_loss_and_gradients(
    assert_close, cut, dtype, tolerance
):
    model = tiny_model(tiny_config("ME*-E/*E/*E"), dtype=dtype)
    parts, objective = documents(*LENGTHS), pretraining(model, **STRONG)
    whole = accumulate(model, [pack(parts)], objective)
    assert all(gradient.any() for gradient in whole[1].values())
    pieces = [pack([parts[n] for n in piece]) for piece in CUTS[cut]]
    assert_same(assert_close, accumulate(model, pieces, objective), whole, tolerance)


def test_a_mask_counts_over_the_global_batch(assert_close):
    """One microbatch with few targets, one with none: their tokens do not weigh more or less."""
    model = tiny_model(tiny_config("ME*-E/*E/*E"), dtype=torch.float64)
    parts, objective = documents(9, 7, 8), pretraining(model, **STRONG)
    masks = [(torch.rand(9) > 0.7).float(), torch.zeros(7), torch.ones(8)]
    whole = accumulate(model, [pack(parts, torch.cat(masks))], objective)
    pieces = [pack([part], mask) for part, mask in zip(parts, masks, strict=True)]
    assert_same(assert_close, accumulate(model, pieces, objective), whole, FLOAT64)


def test_a_microbatch_without_any_target_adds_no_loss(assert_close):
    model = tiny_model()
    batch = pack(documents(6, 5), torch.zeros(11))
    (term,), gradients = accumulate(model, [batch], pretraining(model, balance_loss=0.0))
    assert term.total == 0
    assert term.metrics.pop("train/aux_loss") > 0
    assert len(term.metrics) == 6
    assert not any(value.any() for value in term.metrics.values())
    assert not any(gradient.any() for gradient in gradients.values())


def test_documents_too_short_for_a_depth_have_no_targets_there():
    model = tiny_model("ME/E/E/E")
    counts = pretraining(model).counts(pack(documents(1, 2, 1, 3)))
    assert counts == {
        "targets": 7.0, "targets_mtp_1": 3.0, "targets_mtp_2": 1.0, "targets_mtp_3": 0.0,
        "tokens": 7.0,
    }  # fmt: skip
    (term,), _ = accumulate(model, [pack(documents(1, 2, 1))])
    assert term.metrics["train/loss"] > 0
    assert term.metrics["train/loss_mtp_1"] > 0
    assert term.metrics["train/loss_mtp_2"] == 0


def test_balance_counts_each_router_once_and_the_shared_one_as_the_mean_of_its_depths():
    model = tiny_model(tiny_config("ME*-E/*E/*E"), dtype=torch.float64)
    batch = pack(documents(*LENGTHS))
    seen = {router: [] for router in model.routers}
    hooks = [
        router.register_forward_hook(lambda router, _, routing: seen[router].append(routing))
        for router in model.routers
    ]
    (term,), _ = accumulate(model, [batch])
    for hook in hooks:
        hook.remove()
    assert [len(routings) for routings in seen.values()] == [1, 1, 2]
    wanted = sum(
        sequence_balance_loss(routing, batch.segments).item() / len(routings)
        for routings in seen.values()
        for routing in routings
    )
    assert term.metrics["train/aux_loss"] == pytest.approx(wanted / batch.segments.total)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_targets_of_a_depth_never_cross_a_document(depth):
    """Documents of disjoint vocabularies: each target is of its token's document, one depth on."""
    parts = [torch.arange(100 * n, 100 * n + length) for n, length in enumerate((4, 2, 9, 3), 1)]
    batch = pack(parts)
    targets, mask, weights = batch.at_depth(depth)
    assert weights is None
    counted = mask.bool()
    assert counted.any()
    assert torch.equal(targets[counted] // 100, batch.tokens[counted] // 100)
    assert torch.equal(targets[counted], batch.tokens[counted] + depth + 1)
    assert int(mask.sum()) == sum(max(0, len(part) - 1 - depth) for part in parts)


@pytest.mark.parametrize("pattern", ["ME*-E/*E/*E", "ME*E", "M"])
def test_recomputing_blocks_changes_nothing(assert_close, pattern):
    model = tiny_model(tiny_config(pattern), dtype=torch.float64)
    batch, objective = [pack(documents(*LENGTHS))], pretraining(model, **STRONG)
    plain = accumulate(model, batch, objective)
    assert_same(assert_close, accumulate(model, batch, objective, recompute=True), plain, FLOAT64)


def test_recomputing_keeps_less_for_the_backward_pass():
    model = tiny_model(tiny_config("ME*-E/*E/*E"))
    batch, objective = pack(documents(64, 64)), pretraining(model)

    def kept(*, recompute):
        sizes = {}

        def hold(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            forward(model, batch, objective, recompute=recompute)
        return sum(sizes.values())

    assert kept(recompute=True) < 0.5 * kept(recompute=False)


def test_without_weight_the_mtp_block_is_left_out():
    model = tiny_model("ME*-E/*E/*E")
    objective = pretraining(model, mtp_loss_scaling=0.0)
    assert objective.mtp_depths == 0
    (term,), gradients = accumulate(model, [pack(documents(*LENGTHS))], objective)
    assert {name for name, gradient in gradients.items() if not gradient.any()} == {
        name for name in gradients if name.startswith("mtp.")
    }
    assert term.metrics.keys() == {"train/loss", "train/accuracy", "train/aux_loss"}


@pytest.mark.parametrize("field", ["mtp_loss_scaling", "balance_loss"])
@pytest.mark.parametrize("bad", [-0.1, float("nan")])
def test_bad_weights_are_refused(field, bad):
    with pytest.raises(ConfigError, match=rf"{field} is .*0 or more"):
        PretrainLossConfig(**{field: bad})
