"""Products that round their activations to int8, against the integers that they are defined by."""

import copy
import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from nemotron3.errors import OperandError
from nemotron3.ops import native
from nemotron3.ops.experts import routed_experts
from nemotron3.ops.linear import linear, linear_low_rank, linear_parts
from nemotron3.ops.native.build import FLAGS, HEADERS
from nemotron3.ops.weights import ExpertMatrices, FP8Weight, Int8Weight, LowRankWeight, NVFP4Weight
from nemotron3.ops.weights.integer import round_to_int8, rounded_to_int8
from tests.ops.native import needs_compiler
from tests.ops.test_weights import quantized, random, whole
from tests.tolerances import FLOAT32

BACKENDS = ["torch", *(["native"] if native.available() else [])]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_format = pytest.mark.parametrize("kind", [Int8Weight, NVFP4Weight], ids=["int8", "nvfp4"])


def rounding(kind, *shape):
    return random(kind, *shape).with_activations("int8")


def rows_of(rows, inputs):
    """Rows whose blocks have very different magnitudes."""
    return torch.randn(rows, inputs) * torch.logspace(-3, 3, inputs)


def test_a_block_of_activations_is_half_a_step_off_at_most():
    x = rows_of(9, 70)
    codes, scales = round_to_int8(x)
    assert codes.shape == (9, 70)
    assert scales.shape == (9, 5)
    steps = scales.repeat_interleave(16, -1)[:, :70]
    assert ((rounded_to_int8(x) - x).abs() <= 0.5001 * steps).all()
    for block in codes[:, :64].unflatten(-1, (-1, 16)).flatten(0, 1):
        assert block.abs().max() == 127


def test_zeros_and_tiny_blocks_are_zero_and_the_largest_numbers_are_kept():
    x = torch.zeros(3, 16)
    x[1] = 1e-38
    x[2, 3] = -3.4e38
    rounded = rounded_to_int8(x)
    assert not rounded[:2].any()
    assert torch.allclose(rounded[2], x[2], rtol=1e-6)


@every_format
@every_backend
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 9, 70])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (5, 7), (16, 64), (67, 129), (130, 300)])
def test_linear_is_the_sum_of_integers(kind, backend, rows, outputs, inputs, assert_close):
    weight = rounding(kind, outputs, inputs)
    x = rows_of(rows, weight.shape[1])
    definition = rounded_to_int8(x).double() @ weight.dequantize(torch.float64).T
    assert_close(linear(x, weight, backend="reference").double(), definition, FLOAT32)
    assert_close(linear(x, weight, backend=backend).double(), definition, FLOAT32)


@needs_compiler
@every_format
def test_a_row_does_not_depend_on_those_beside_it(kind):
    weight = rounding(kind, 45, 300)
    x = rows_of(133, weight.shape[1])
    together = linear(x, weight, backend="native")
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            assert torch.equal(linear(x, weight, backend="native"), together)
            assert torch.equal(linear(x[77:78], weight, backend="native"), together[77:78])
            assert torch.equal(linear(x[60:66], weight, backend="native"), together[60:66])
        finally:
            torch.set_num_threads(2)


@every_format
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_reaches_its_row_alone(kind, backend, value):
    weight = rounding(kind, 9, 40)
    x = rows_of(4, weight.shape[1])
    x[2, 21] = value
    y = linear(x, weight, backend=backend)
    assert not y[2].isfinite().any()
    assert y[[0, 1, 3]].isfinite().all()


@every_backend
def test_strides_parts_and_batches(backend):
    weight = rounding(NVFP4Weight, 10, 48)
    wide = torch.randn(2, 3, 100)
    x = wide[..., 7:55]
    whole = linear(x, weight, backend=backend)
    assert torch.equal(whole, linear(x.contiguous(), weight, backend=backend))
    parts = linear_parts(x, weight, [1, 6, 3], backend=backend)
    assert torch.equal(torch.cat(parts, -1), whole)


@every_format
@every_backend
def test_a_low_rank_change_multiplies_what_is_not_rounded(kind, backend, assert_close):
    weight = rounding(kind, 33, 100)
    inputs = weight.shape[1]
    x, A, B = torch.randn(5, inputs), torch.randn(3, inputs) / 10, torch.randn(33, 3)
    changed = LowRankWeight(weight, A, B, 0.7)
    expected = linear(x, weight, backend="reference") + 0.7 * (x @ A.T) @ B.T
    for chosen in (backend, "reference"):
        assert_close(linear_low_rank(x, changed, backend=chosen), expected, FLOAT32)


def exact(kind, *shape):
    """A weight of small integers, and of zeros and blocks that make its scales powers of two."""
    matrix = torch.randint(-1, 2, (*shape[:-1], whole(kind, shape[-1]))).float()
    if kind is NVFP4Weight:
        return quantized(kind, matrix)
    return Int8Weight(matrix.to(torch.int8), torch.full(shape[:-1], 0.25))


@every_format
@every_backend
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize(
    ("tokens", "experts", "k"), [(1, 4, 1), (2, 8, 3), (9, 4, 2), (30, 2, 2), (3, 16, 3)]
)
def test_routed_experts_round_hidden_units_too(
    kind, backend, tokens, experts, k, changed, assert_close
):
    """First products without a rounding error, since one would change codes of hidden units."""
    up, down = exact(kind, experts, 70, 33), random(kind, experts, whole(kind, 33), whole(kind, 70))
    up = exact(kind, experts, down.shape[2], down.shape[1]).with_activations("int8")
    down = down.with_activations("int8")
    x = torch.randint(-8, 9, (tokens, up.shape[2])).float()
    x[:, ::16] = 127  # codes are the numbers
    indices = torch.rand(tokens, experts).topk(k).indices
    weights = torch.full((tokens, k), 0.5)
    given = up, down
    if changed:
        A, B = torch.randn(experts, 2, down.shape[2]), torch.randn(experts, down.shape[1], 2)
        given = up, LowRankWeight(down, A, B, 1e-3)
    found, expected = (
        routed_experts(x, indices, weights, *given, activation="relu2", backend=chosen)
        for chosen in (backend, "reference")
    )
    assert_close(found, expected, FLOAT32)


@needs_compiler
@every_format
@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_an_expert_does_not_depend_on_the_tokens_beside(kind, activation):
    factor = 2 if activation == "swiglu" else 1
    up = rounding(kind, 4, factor * 48, 64)
    down = rounding(kind, 4, 64, 48)
    x, indices = torch.randn(100, 64), torch.rand(100, 4).topk(2).indices
    weights = torch.rand(100, 2)
    many = routed_experts(x, indices, weights, up, down, activation=activation, backend="native")
    few = routed_experts(
        x[7:9], indices[7:9], weights[7:9], up, down, activation=activation, backend="native"
    )
    assert torch.equal(few, many[7:9])


@needs_compiler
def test_matrices_in_memory_of_their_own():
    up, down = rounding(NVFP4Weight, 4, 48, 64), rounding(NVFP4Weight, 4, 64, 48)
    apart = [ExpertMatrices(list(w.with_activations(None))) for w in (up, down)]
    assert [w.activations for w in apart] == [None, None]
    apart = [w.with_activations("int8") for w in apart]
    assert [w.activations for w in (*apart, apart[0][1], apart[0][1:])] == ["int8"] * 4
    x, indices = torch.randn(3, 64), torch.rand(3, 4).topk(2).indices
    weights = torch.rand(3, 2)
    found, expected = (
        routed_experts(x, indices, weights, *matrices, activation="relu2", backend="native")
        for matrices in (apart, (up, down))
    )
    assert torch.equal(found, expected)


@every_format
def test_parts_round_as_the_whole(kind):
    weight = random(kind, 3, 8, 20)
    rounds = weight.with_activations("int8")
    assert weight.activations is None
    assert rounds[1].activations == rounds[1][2:5].activations == "int8"
    assert rounds.with_activations(None).activations is None
    assert copy.deepcopy(rounds).activations == "int8"
    assert next(rounds.buffers()).data_ptr() == next(weight.buffers()).data_ptr()


def test_gradients_are_refused():
    weight = rounding(Int8Weight, 5, 7)
    x = torch.randn(3, 7, requires_grad=True)
    with pytest.raises(OperandError, match="linear: an operand needs gradients"):
        linear(x, weight)
    A, B = torch.randn(2, 7, requires_grad=True), torch.randn(5, 2)
    with pytest.raises(OperandError, match="linear: an operand needs gradients"):
        linear_low_rank(x.detach(), LowRankWeight(weight, A, B, 1.0))
    up, down = rounding(Int8Weight, 2, 5, 7), rounding(Int8Weight, 2, 7, 5)
    indices, weights = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    with pytest.raises(OperandError, match="experts: an operand needs gradients"):
        routed_experts(x, indices, weights, up, down, activation="relu2")


def test_matrices_of_an_expert_round_alike():
    up, down = rounding(Int8Weight, 2, 5, 7), random(Int8Weight, 2, 7, 5)
    indices, weights = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    with pytest.raises(OperandError, match="up round their activations to int8"):
        routed_experts(torch.randn(3, 7), indices, weights, up, down, activation="relu2")


def test_elements_that_are_no_integers_are_not_rounded():
    assert not hasattr(random(FP8Weight, 5, 7), "with_activations")


PROGRAM = """
#include "int8_activations.h"
extern "C" void nvfp4(const float* x, const uint8_t* codes, const uint8_t* blocks,
                      const float* scales, float* y, int64_t rows, int64_t n, int64_t k) {
  few_rows(rows, x, k, Int8Activations<NVFP4Rows>{{codes, blocks, scales}}, 0, n, k, y, n);
}
extern "C" void int8(const float* x, const int8_t* codes, const float* scales, float* y,
                     int64_t rows, int64_t n, int64_t k) {
  few_rows(rows, x, k, Int8Activations<Int8Rows>{{codes, scales}}, 0, n, k, y, n);
}
"""


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("processor", ["haswell", "x86-64"])
def test_processors_without_such_instructions_add_the_same_integers(
    processor, tmp_path: Path, assert_close
):
    """Code for other processors, which this one runs too."""
    library = tmp_path / "other.so"
    (tmp_path / "other.cpp").write_text(PROGRAM)
    flags = [flag for flag in FLAGS if flag != "-march=native"]
    command = ["c++", *flags, f"-march={processor}", f"-I{HEADERS}", "-o", str(library)]
    made = subprocess.run(
        [*command, str(tmp_path / "other.cpp")], capture_output=True, text=True, check=False
    )
    if "march" in made.stderr or "mtune" in made.stderr:
        pytest.skip(f"the compiler does not know {processor}: {made.stderr[:200]}")
    assert made.returncode == 0, made.stderr
    functions = ctypes.CDLL(str(library))
    for kind, name in ((NVFP4Weight, "nvfp4"), (Int8Weight, "int8")):
        for rows, outputs, inputs in ((1, 1, 1), (3, 33, 129), (9, 16, 304), (70, 5, 64)):
            weight = rounding(kind, outputs, inputs)
            inputs = weight.shape[1]
            x, y = rows_of(rows, inputs), torch.full((rows, outputs), torch.nan)
            operands = [x, *(part.contiguous() for part in weight.buffers()), y]
            places = [ctypes.c_void_p(t.data_ptr()) for t in operands]
            getattr(functions, name)(*places, *map(ctypes.c_int64, (rows, outputs, inputs)))
            assert_close(y, linear(x, weight, backend="reference"), FLOAT32)
