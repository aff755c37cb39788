"""The loss is one number for a global batch, however the batch is cut, packed or computed."""

import pytest
import torch

from nemotron3.errors import ConfigError
from nemotron3.training.balancing import BalanceConfig, sequence_balance_loss
from nemotron3.training.losses import LossConfig, loss_terms
from tests.tiny import tiny_config, tiny_model
from tests.tolerances import FLOAT32, FLOAT64
from tests.training.batches import accumulate, documents, pack

# A strong balance loss, so that an error in it cannot hide behind the cross-entropy.
CONFIG = LossConfig(balance=BalanceConfig(sequence_loss=0.5))
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


def assert_same(assert_close, actual, expected, tolerance):
    (terms, gradients), (wanted_terms, wanted_gradients) = actual, expected
    assert_close(_total(terms), _total(wanted_terms), tolerance)
    for got, wanted in zip(_sums(terms), _sums(wanted_terms), strict=True):
        assert got == pytest.approx(wanted, rel=max(tolerance, 1e-6))
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        assert wanted_gradients[name].any(), f"{name} has no gradient to compare"
        scale = wanted_gradients[name].abs().max()
        assert_close(gradient / scale, wanted_gradients[name] / scale, tolerance)


def _total(terms):
    return sum(term.total.detach() for term in terms)


def _sums(terms):
    """What the metrics of the step are made of: losses and accuracies by depth, and balance."""
    columns = [[*t.losses, *t.accuracies, t.balance] for t in terms]
    loads = [sum(same) for same in zip(*(t.loads for t in terms), strict=True)]
    sums = [sum(column) for column in zip(*columns, strict=True)]
    return sums + [share for load in loads for share in load.tolist()]


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
    parts = documents(*LENGTHS)
    whole = accumulate(model, [pack(parts)], CONFIG)
    pieces = accumulate(model, [pack([parts[n] for n in piece]) for piece in CUTS[cut]], CONFIG)
    assert_same(assert_close, pieces, whole, tolerance)


def test_a_mask_counts_over_the_global_batch(assert_close):
    """One microbatch with few targets, one with none: their tokens do not weigh more or less."""
    model = tiny_model(tiny_config("ME*-E/*E/*E"), dtype=torch.float64)
    parts = documents(9, 7, 8)
    masks = [(torch.rand(9) > 0.7).float(), torch.zeros(7), torch.ones(8)]
    whole = accumulate(model, [pack(parts, torch.cat(masks))], CONFIG)
    pieces = [pack([part], mask) for part, mask in zip(parts, masks, strict=True)]
    assert_same(assert_close, accumulate(model, pieces, CONFIG), whole, FLOAT64)


def test_a_microbatch_without_any_target_adds_no_loss(assert_close):
    model = tiny_model()
    config = LossConfig(balance=BalanceConfig(sequence_loss=0.0))
    (term,), gradients = accumulate(model, [pack(documents(6, 5), torch.zeros(11))], config)
    assert term.total == 0
    assert term.losses == term.accuracies == [0.0, 0.0, 0.0]
    assert not any(gradient.any() for gradient in gradients.values())


def test_documents_too_short_for_a_depth_have_no_targets_there():
    batch = pack(documents(1, 2, 1, 3))
    assert batch.counts(3) == [7.0, 3.0, 1.0, 0.0]
    (term,), _ = accumulate(tiny_model(), [pack(documents(1, 2, 1))], CONFIG)
    assert term.losses[0] > 0
    assert term.losses[1] > 0
    assert term.losses[2] == 0


def test_balance_counts_each_router_once_and_the_shared_one_as_the_mean_of_its_depths():
    model = tiny_model(tiny_config("ME*-E/*E/*E"), dtype=torch.float64)
    batch = pack(documents(*LENGTHS))
    seen = {router: [] for router in model.routers}
    hooks = [
        router.register_forward_hook(lambda router, _, routing: seen[router].append(routing))
        for router in model.routers
    ]
    (term,), _ = accumulate(model, [batch], CONFIG)
    for hook in hooks:
        hook.remove()
    assert [len(routings) for routings in seen.values()] == [1, 1, 2]
    wanted = sum(
        sequence_balance_loss(routing, batch.segments).item() / len(routings)
        for routings in seen.values()
        for routing in routings
    )
    assert term.balance == pytest.approx(wanted / batch.segments.total)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_targets_of_a_depth_never_cross_a_document(depth):
    """Documents of disjoint vocabularies: each target is of its token's document, one depth on."""
    parts = [torch.arange(100 * n, 100 * n + length) for n, length in enumerate((4, 2, 9, 3), 1)]
    batch = pack(parts)
    inputs, targets, mask = batch.at_depth(depth)
    counted = mask.bool()
    assert counted.any()
    assert torch.equal(targets[counted] // 100, batch.tokens[counted] // 100)
    assert torch.equal(targets[counted], batch.tokens[counted] + depth + 1)
    assert torch.equal(inputs[counted], batch.tokens[counted] + depth)
    assert int(mask.sum()) == sum(max(0, len(part) - 1 - depth) for part in parts)


@pytest.mark.parametrize("pattern", ["ME*-E/*E/*E", "ME*E", "M"])
def test_recomputing_blocks_changes_nothing(assert_close, pattern):
    model = tiny_model(tiny_config(pattern), dtype=torch.float64)
    batch = [pack(documents(*LENGTHS))]
    plain = accumulate(model, batch, CONFIG)
    assert_same(assert_close, accumulate(model, batch, CONFIG, recompute=True), plain, FLOAT64)


def test_recomputing_keeps_less_for_the_backward_pass():
    model = tiny_model(tiny_config("ME*-E/*E/*E"))
    batch = [pack(documents(64, 64))]

    def kept(*, recompute):
        sizes = {}

        def hold(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            loss_terms(
                model, batch[0], batch[0].counts(2), CONFIG, total_tokens=128, recompute=recompute
            )
        return sum(sizes.values())

    assert kept(recompute=True) < 0.5 * kept(recompute=False)


@pytest.mark.parametrize("bad", [-0.1, float("nan")])
def test_bad_weights_are_refused(bad):
    with pytest.raises(ConfigError, match=r"mtp_loss_scaling is .*0 or more"):
        LossConfig(mtp_loss_scaling=bad)
    with pytest.raises(ConfigError, match=r"sequence_loss is .*0 or more"):
        BalanceConfig(sequence_loss=bad)
