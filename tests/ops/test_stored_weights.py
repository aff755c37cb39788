"""Products with weights as a file holds them: bfloat16, and matrices of experts that are apart.

They compute what the float32 copy, or the stack, computes, to the bit.
"""

import copy

import pytest
import torch

from nemotron3.errors import OperandError
from nemotron3.ops import native
from nemotron3.ops.experts import routed_experts
from nemotron3.ops.graph import Graph
from nemotron3.ops.linear import linear, linear_parts
from nemotron3.ops.products import dense, grouped
from nemotron3.ops.weights import FORMATS, ExpertMatrices, LowRankWeight, low_rank

BACKENDS = ["reference", "torch", *(["native"] if native.available() else [])]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_format = pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS.keys())
needs_compiler = pytest.mark.skipif(not native.available(), reason="needs a C++ compiler")


def quantized(kind, *shape):
    return kind.empty(torch.Size(shape)).copy_(torch.randn(shape))


def apart(weight):
    """The same matrices, each somewhere of its own, in no order, at odd addresses."""
    made = {}
    for expert in reversed(range(weight.shape[0])):
        parts = [moved(part) for part in weight[expert].buffers()]
        made[expert] = type(weight)(*parts)
    return ExpertMatrices([made[expert] for expert in range(weight.shape[0])])


def moved(part):
    """A copy whose address is as little aligned as its elements allow."""
    memory = torch.empty(part.numel() + 1, dtype=part.dtype)
    return memory[1:].view(part.shape).copy_(part)


@every_backend
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 8, 9, 16, 131])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (5, 7), (16, 64), (67, 129), (130, 300)])
def test_a_bfloat16_weight_is_its_float32_copy(backend, rows, outputs, inputs):
    weight = moved(torch.randn(outputs, inputs).bfloat16())
    x, wide = torch.randn(rows, inputs), weight.float()
    assert torch.equal(linear(x, weight, backend=backend), linear(x, wide, backend=backend))
    x.requires_grad_()
    weight.requires_grad_()
    wide.requires_grad_()
    dy = torch.randn(rows, outputs)
    found = torch.autograd.grad(linear(x, weight, backend=backend), (x, weight), dy)
    expected = torch.autograd.grad(linear(x, wide, backend=backend), (x, wide), dy)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1].bfloat16())


@every_backend
def test_parts_and_batches_of_a_bfloat16_product(backend):
    x, weight = torch.randn(2, 3, 7), torch.randn(10, 7).bfloat16()
    whole = linear(x, weight.float(), backend=backend)
    parts = linear_parts(x, weight, [1, 6, 3], backend=backend)
    assert torch.equal(torch.cat(parts, -1), whole)
    one = linear(x[0, 0], weight, backend=backend)
    assert torch.equal(one, linear(x[0, 0], weight.float(), backend=backend))


@pytest.mark.usefixtures("poisoned_memory")
@every_backend
@pytest.mark.parametrize(("tokens", "experts", "k"), [(0, 4, 2), (1, 4, 1), (9, 4, 2), (90, 2, 2)])
@pytest.mark.parametrize(("activation", "factor"), [("relu2", 1), ("swiglu", 2)])
def test_bfloat16_experts_are_their_float32_copies(backend, tokens, experts, k, activation, factor):
    d, width = 33, 70
    up = (torch.randn(experts, factor * width, d) / d**0.5).bfloat16()
    down = (torch.randn(experts, d, width) / width**0.5).bfloat16()
    chosen = torch.rand(tokens, experts).topk(k).indices, torch.rand(tokens, k)
    x = torch.randn(tokens, d, requires_grad=True)

    def mixture(*matrices):
        return routed_experts(x, *chosen, *matrices, activation=activation, backend=backend)

    expected = mixture(up.float(), down.float())
    found = mixture(up, down)
    assert torch.equal(found, expected)
    (dx,) = torch.autograd.grad(found.sum(), x)
    assert torch.equal(dx, torch.autograd.grad(expected.sum(), x)[0])
    with torch.no_grad():
        for matrices in ((up, down), (up.float(), down), (up, down.float())):
            wide = mixture(*(matrix.float() for matrix in matrices))
            assert torch.equal(mixture(*matrices), wide)


@pytest.mark.usefixtures("poisoned_memory")
@every_format
@every_backend
@pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 4, 1), (9, 4, 2), (3, 16, 3), (90, 2, 2)])
def test_experts_that_are_apart_are_those_in_a_stack(kind, backend, tokens, experts, k):
    """Also where some have no token, and where one of the two weights is a stack."""
    up, down = quantized(kind, experts, 64, 32), quantized(kind, experts, 32, 64)
    chosen = torch.rand(tokens, experts).topk(k).indices, torch.rand(tokens, k)
    x = torch.randn(tokens, 32, requires_grad=True)

    def mixture(*matrices):
        return routed_experts(x, *chosen, *matrices, activation="relu2", backend=backend)

    expected = mixture(up, down)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    for matrices in ((apart(up), apart(down)), (apart(up), down), (up, apart(down))):
        found = mixture(*matrices)
        assert torch.equal(found, expected)
        assert torch.equal(torch.autograd.grad(found.sum(), x)[0], gradient)
        with torch.no_grad():
            assert torch.equal(mixture(*matrices), mixture(up, down))


def changed(base, rank):
    """A weight of experts with a random change of low rank."""
    experts, d_out, d_in = base.shape
    A = (torch.randn(experts, rank, d_in) / d_in**0.5).requires_grad_()
    return LowRankWeight(base, A, torch.randn(experts, d_out, rank).requires_grad_(), 0.7)


def beside(weight, base):
    """The same change beside another base, or that base where there is none."""
    if not isinstance(weight, LowRankWeight):
        return base
    return LowRankWeight(base, weight.A, weight.B, weight.scale)


@pytest.mark.usefixtures("poisoned_memory")
@every_format
@every_backend
@pytest.mark.parametrize("which", ["up", "down", "both"])
@pytest.mark.parametrize(("tokens", "experts", "k"), [(0, 4, 2), (1, 4, 1), (9, 4, 2), (90, 2, 2)])
def test_changes_beside_experts_that_are_apart(kind, backend, which, tokens, experts, k):
    """Of either matrix or both, with and without gradients: as beside a stack."""
    bases = quantized(kind, experts, 64, 32), quantized(kind, experts, 32, 64)
    stacks = [
        changed(base, rank) if which in (name, "both") else base
        for name, base, rank in zip(("up", "down"), bases, (3, 5), strict=True)
    ]
    chosen = torch.rand(tokens, experts).topk(k).indices, torch.rand(tokens, k)
    x = torch.randn(tokens, 32, requires_grad=True)
    parts = [t for w in stacks if isinstance(w, LowRankWeight) for t in (w.A, w.B)]

    def results(*matrices):
        def mixture():
            return routed_experts(x, *chosen, *matrices, activation="relu2", backend=backend)

        with torch.no_grad():
            alone = mixture()
        y = mixture()
        return alone, y, *torch.autograd.grad(y.sum(), (x, *parts), materialize_grads=True)

    expected = results(*stacks)
    for moved_bases in ((apart(bases[0]), apart(bases[1])), (apart(bases[0]), bases[1])):
        found = results(*map(beside, stacks, moved_bases))
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs)


@every_format
def test_a_changed_matrix_that_is_apart_has_a_value(kind, monkeypatch):
    """In slices of some experts, as of a stack."""
    stack = changed(quantized(kind, 5, 8, 32), 2)
    monkeypatch.setattr(low_rank, "SLICE", 2 * 8 * 32)
    with torch.no_grad():
        assert torch.equal(beside(stack, apart(stack.base)).dequantize(), stack.dequantize())


@every_format
def test_apart_is_a_weight_like_any_other(kind):
    stack = quantized(kind, 3, 8, 32)
    weight = apart(stack)
    assert (weight.shape, weight.format, weight.nbytes) == (stack.shape, kind.format, stack.nbytes)
    assert torch.equal(weight.dequantize(), stack.dequantize())
    for own, matrix in zip(weight, stack, strict=True):
        assert type(own) is kind
        assert torch.equal(own.dequantize(), matrix.dequantize())
    assert torch.equal(weight[1, 4:].dequantize(), stack[1][4:].dequantize())
    assert torch.equal(weight[-1].dequantize(), stack[2].dequantize())
    assert torch.equal(weight[1:].dequantize(), stack[1:].dequantize())
    with pytest.raises(IndexError):
        weight[3]
    new = torch.randn(4, 32)
    weight[1][4:].copy_(new)
    assert torch.equal(weight.dequantize()[1, 4:], kind.empty(new.shape).copy_(new).dequantize())
    assert torch.equal(weight.stacked().dequantize(), weight.dequantize())
    for name, part in stack.parts().items():
        weight.load_part(name, part)
    assert torch.equal(weight.dequantize(), stack.dequantize())
    assert torch.equal(weight.copy_(-stack.dequantize()).dequantize(), -stack.dequantize())


@needs_compiler
@every_format
@pytest.mark.parametrize("conversion", ["deepcopy", "half", "double"])
def test_a_copy_multiplies_with_its_own_matrices(kind, conversion):
    """The table of addresses follows the memory; the first weight may be gone or written."""
    first = torch.nn.ModuleList([apart(quantized(kind, 4, n, m)) for n, m in ((32, 16), (16, 32))])
    chosen = torch.tensor([[3], [0]]), torch.ones(2, 1)
    x = torch.randn(2, 16)
    with torch.no_grad():
        expected = grouped(x, *chosen, *first, activation="relu2")
        second = copy.deepcopy(first)
        if conversion != "deepcopy":
            second = getattr(second, conversion)()
        for weight in first:
            weight.copy_(torch.zeros(weight.shape))
        assert torch.equal(grouped(x, *chosen, *second, activation="relu2"), expected)
        assert not grouped(x, *chosen, *first, activation="relu2").any()


@needs_compiler
@every_format
def test_a_recording_keeps_its_matrices_alive(kind):
    """Memory that a table points to belongs to the recording, whoever else drops it."""
    up, down = apart(quantized(kind, 4, 32, 16)), apart(quantized(kind, 4, 16, 32))
    head = torch.randn(9, 16).bfloat16()
    x, chosen = torch.randn(2, 16), (torch.tensor([[3], [0]]), torch.ones(2, 1))
    graph = Graph()
    with torch.no_grad():
        with graph.record():
            y = dense(grouped(x, *chosen, up, down, activation="relu2"), head)
        expected = [dense(grouped(2 * x, *chosen, up, down, activation="relu2"), head), y.clone()]
        del up, down, head
        for scale in (2, 0.5):
            x.mul_(scale)
            graph.replay()
            assert torch.equal(y, expected.pop(0))


@needs_compiler
@every_format
def test_a_recording_follows_the_changes_beside_its_matrices(kind):
    up, down = (
        changed(apart(quantized(kind, 4, n, m)), rank) for n, m, rank in ((32, 16, 3), (16, 32, 2))
    )
    x, chosen = torch.randn(2, 16), (torch.tensor([[3], [0]]), torch.ones(2, 1))
    graph = Graph()
    with torch.no_grad():
        with graph.record():
            y = grouped(x, *chosen, up, down, activation="relu2")
        before = y.clone()
        changes = [up.A, up.B, down.A, down.B]
        for part in changes:
            part.mul_(-1.5)
        expected = grouped(x, *chosen, up, down, activation="relu2")
        del up, down
        graph.replay()
        assert torch.equal(y, expected)
        assert not torch.equal(y, before)


def test_a_float32_copy_is_made_only_where_gradients_need_it(monkeypatch):
    """The output layer of a large vocabulary has gigabytes, and is read at every step."""
    weight, x = torch.randn(1000, 16).bfloat16(), torch.randn(2, 16)
    wide = []
    convert = torch.Tensor.to

    def watched(tensor, *args, **options):
        result = convert(tensor, *args, **options)
        if tensor is weight and result is not weight:
            wide.append(result.dtype)
        return result

    monkeypatch.setattr(torch.Tensor, "to", watched)
    with torch.no_grad():
        dense(x, weight)
    assert wide == ([] if native.available() else [torch.float32])
    dense(x.requires_grad_(), weight)
    assert wide[-1:] == [torch.float32]


def test_mistakes_are_named():
    x, chosen = torch.randn(3, 16), (torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1))
    with pytest.raises(OperandError, match=r"weight has dtype torch.float16; .*float32"):
        linear(x, torch.randn(4, 16).half())
    with pytest.raises(OperandError, match=r"weight has dtype torch.bfloat16; .*float64"):
        linear(x.double(), torch.randn(4, 16).bfloat16())
    up, down = (apart(quantized(kind, 2, 16, 16)) for kind in list(FORMATS.values())[:2])
    with pytest.raises(OperandError, match="up is int8 and down fp8"):
        routed_experts(x, *chosen, up, down, activation="relu2")
