"""Wrong operands are refused alike by every backend, and awkward ones are computed alike."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tests.ops.interpreter  # noqa: F401 - before any kernel is imported
from nemotron3.errors import BackendUnavailableError, OperandError, OperandIndexError
from nemotron3.ops.cross_entropy import linear_cross_entropy
from nemotron3.ops.experts import routed_experts
from nemotron3.ops.graph import Graph
from nemotron3.ops.linear import linear
from nemotron3.ops.routing import route
from nemotron3.ops.segments import Segments
from nemotron3.ops.ssd import ssd_steps
from tests.ops.catalogue import OPERATIONS
from tests.ops.native import needs_compiler
from tests.tolerances import FLOAT32, FLOAT64

ROOT = Path(__file__).parents[2]
DIFFERENTIABLE = [
    "linear", "linear_batched", "linear_parts", "experts", "activation", "route", "rms_norm",
    "gated_group_norm", "conv", "ssd", "ssd_rates", "attention", "cross_entropy",
    "token_logprobs",
]  # fmt: skip
WITHOUT_TRITON = {
    "linear", "linear_batched", "linear_parts", "activation", "route", "ssd_rates", "attention",
}  # fmt: skip
STEPS = ["conv_steps", "ssd_steps", "attention_steps"]


@pytest.fixture(scope="module")
def mistakes() -> tuple[str, str]:
    """Runs `mistakes.py` by itself, so that a crash of the process is a failure of a test."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.ops.mistakes"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    ended = f"ended by {signal.Signals(-run.returncode).name}" if run.returncode < 0 else ""
    return run.stdout, f"{ended} after {run.stdout[-200:]!r}\n{run.stderr}"


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_mistake_is_the_same_error_on_every_backend(name, mistakes):
    output, errors = mistakes
    assert f"passed {name}\n" in output, errors


def computed(name, operands, backend, dtype, awkward=False):
    """Outputs, and gradients of a sum of their squares, in `dtype`."""
    given = {}
    for key, value in operands.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value.detach().to(dtype)
            if awkward:
                value = torch.stack([value, value], -1)[..., 0]
            value.requires_grad_()
        elif isinstance(value, Tensor) and awkward:
            value = torch.stack([value, value], -1)[..., 0]
        given[key] = value
    results = OPERATIONS[name].call(backend=backend, **given)
    outputs = [results] if isinstance(results, Tensor) else list(results)
    wanted = [v for v in given.values() if isinstance(v, Tensor) and v.requires_grad]
    sum(y.square().sum() for y in outputs if y.requires_grad).backward()
    return outputs, [t.grad if t.grad is not None else torch.zeros_like(t) for t in wanted]


@needs_compiler
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("awkward", [False, True], ids=["contiguous", "apart in memory"])
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        (name, backend)
        for name in DIFFERENTIABLE
        for backend in ("torch", "native", "triton")
        if backend != "triton" or name not in WITHOUT_TRITON
    ],
)
def test_no_token_one_token_and_a_few(name, backend, awkward, assert_close):
    for tokens in OPERATIONS[name].sizes:
        operands = OPERATIONS[name].operands(tokens)
        expected = computed(name, operands, "reference", torch.float64)
        found = computed(name, operands, backend, torch.float32, awkward)
        for these, those in zip(found, expected, strict=True):
            for a, e in zip(these, those, strict=True):
                assert_close(a.double(), e.double(), FLOAT32)


@needs_compiler
@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
@pytest.mark.parametrize("name", STEPS)
def test_no_sequence_one_sequence_and_a_few(name, backend, assert_close):
    operation = OPERATIONS[name]
    for sequences in operation.sizes:
        operands = operation.operands(sequences)
        for leaves_out in (
            ((), ("intermediate_states",)) if "intermediate_states" in operands else ((),)
        ):
            given = {k: v for k, v in operands.items() if k not in leaves_out}
            written = [key for key in operation.written if key in given]
            results = []
            for which, dtype in (("torch", torch.float64), (backend, torch.float32)):
                own = {
                    k: v.to(dtype, copy=True) if v.is_floating_point() else v
                    for k, v in given.items()
                }
                y = operation.call(backend=which, **own)
                results.append([y, *(own[key] for key in written)])
            for e, a in zip(*results, strict=True):
                assert_close(a.double(), e, FLOAT32)


def test_an_operation_without_tokens_still_has_gradients():
    """The parameters of a rank without tokens take part in the sum over ranks, with zeros."""
    for name in DIFFERENTIABLE:
        operands = OPERATIONS[name].operands(0)
        for backend in ("torch", "auto"):
            leaves = {
                k: v.detach().requires_grad_()
                for k, v in operands.items()
                if isinstance(v, Tensor) and v.is_floating_point()
            }
            results = OPERATIONS[name].call(backend=backend, **operands | leaves)
            outputs = [results] if isinstance(results, Tensor) else results
            sum(y.sum() for y in outputs if y.requires_grad).backward()
            if name == "ssd_rates":  # whose second result is of no token
                del leaves["A_log"]
            for key, leaf in leaves.items():
                if (name, key) not in (("route", "bias"), ("cross_entropy", "token_weights")):
                    assert leaf.grad is not None, (name, key)
                    assert not leaf.grad.any()


@pytest.mark.parametrize("backend", ["reference", "torch", "native", "auto", "triton"])
def test_a_target_outside_the_vocabulary_is_refused(backend):
    h, w, weights = torch.randn(3, 4), torch.randn(9, 4), torch.zeros(3)
    for target in (-100, -1, 9, 10**7):
        targets = torch.tensor([1, target, 2])
        with pytest.raises(OperandIndexError, match=rf"targets holds {target}; .*from 0 to 8"):
            linear_cross_entropy(h, w, targets, weights, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "torch", "native", "triton"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_integers_of_any_width_are_converted(backend, dtype):
    operands = OPERATIONS["cross_entropy"].operands(7)
    narrow = operands | {"targets": operands["targets"].to(dtype)}
    call = OPERATIONS["cross_entropy"].call
    wide_losses = call(**operands, backend=backend).per_token
    assert torch.equal(call(**narrow, backend=backend).per_token, wide_losses)


def test_messages_name_the_operand_what_was_found_and_what_was_expected():
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    with pytest.raises(RuntimeError, match=r"linear: weight has dtype torch.float16; .*float32"):
        linear(x, weight.half())
    with pytest.raises(RuntimeError, match=r"linear: weight has shape \[5, 3\]; .*\[5, 4\]"):
        linear(x, weight[:, :3])
    with pytest.raises(RuntimeError, match=r"linear: weight is on meta; expected cpu"):
        linear(x, weight.to("meta"))
    with pytest.raises(IndexError, match=r"experts: indices holds 9; .*from 0 to 3"):
        routed_experts(
            x, torch.tensor([[0], [9], [1]]), torch.ones(3, 1), torch.ones(4, 2, 4),
            torch.ones(4, 4, 2), activation="relu2",
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"activation is 'gelu'; choose from relu2, swiglu"):
        routed_experts(
            x, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), torch.ones(4, 2, 4),
            torch.ones(4, 4, 2), activation="gelu",
        )  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_router_whose_bias_was_converted_chooses_by_that_bias(dtype):
    """`model.to(dtype)` converts buffers too; the logits stay float32."""
    logits, bias = torch.randn(50, 8), torch.randn(8).to(dtype)
    given = {"choices": 3, "scoring": "sigmoid", "normalise": True, "scale": 2.5}
    expected = route(logits, bias, **given, backend="reference")
    for found, wanted in zip(route(logits, bias, **given), expected, strict=True):
        assert torch.equal(found, wanted)
    with pytest.raises(BackendUnavailableError, match=f"was given {dtype}"):
        route(logits, bias, **given, backend="native")


def test_steps_refuse_to_lose_gradients():
    operands = OPERATIONS["ssd_steps"].operands(2)
    operands["x"].requires_grad_()
    for backend in ("torch", "auto"):
        with pytest.raises(OperandError, match="has no gradients"):
            ssd_steps(**operands, backend=backend)


@needs_compiler
class TestReplay:
    """A recording is replayed with other indices, which must be checked again."""

    @pytest.fixture(autouse=True)
    def _no_gradients(self):
        with torch.inference_mode():
            yield

    def test_refuses_tokens_outside_the_vocabulary_and_then_goes_on(self):
        table, tokens, graph = torch.randn(9, 4), torch.tensor([1, 2, 3]), Graph()
        with graph.record():
            y = torch.nn.functional.embedding(tokens, table)
        for wrong in (9, -1, 10**9):
            tokens[1] = wrong
            with pytest.raises(OperandIndexError, match=f"embedding: tokens holds {wrong};"):
                graph.replay()
        tokens[1] = 8
        graph.replay()
        assert torch.equal(y, table[tokens])

    @pytest.mark.parametrize(("name", "key"), [
        ("conv_steps", "slots"), ("ssd_steps", "slots"),
        ("attention_steps", "slots"), ("attention_steps", "cached_lengths"),
    ])  # fmt: skip
    def test_refuses_slots_and_lengths_that_are_not_there(self, name, key):
        operands = OPERATIONS[name].operands(2)
        given = torch.stack([operands[key], operands[key]])  # a view of it is what is recorded
        operands[key], graph = given[1], Graph()
        with graph.record():
            OPERATIONS[name].call(backend="auto", **operands)
        graph.replay()
        given[1, 0] = 400
        with pytest.raises(OperandIndexError, match=f"{name}: {key} holds 400"):
            graph.replay()

    def test_looks_at_what_it_was_given_once_and_not_at_what_it_makes(self):
        table, tokens, graph = torch.randn(9, 4), torch.tensor([1, 2, 3]), Graph()
        with graph.record():
            for _ in range(3):
                torch.nn.functional.embedding(tokens, table)
                torch.nn.functional.embedding((tokens + 1).clone(), table)
        assert len(graph._watched) == 1


def test_empty_segments():
    assert Segments([]).max_length == 0
    assert Segments([]).positions(torch.device("cpu")).tolist() == []
    assert Segments([]).ids(torch.device("cpu")).tolist() == []
    assert Segments([]).uniform_length is None
    with pytest.raises(ValueError, match="at least one token"):
        Segments([3, 0])


@pytest.mark.parametrize(
    "bounds", [torch.tensor([2, 3, 8]), torch.tensor([[0, 3]]), torch.tensor([0.0, 3.0]),
               torch.tensor([], dtype=torch.int64), torch.tensor([0, 3, 2])]
)  # fmt: skip
def test_bounds_of_segments_begin_at_zero_and_rise(bounds):
    with pytest.raises(ValueError, match=r"cu_seqlens|segment"):
        Segments.from_cu_seqlens(bounds)


def test_lengths_of_segments_are_whole_numbers():
    with pytest.raises(TypeError):
        Segments([2.7])
    assert Segments(torch.tensor([2, 3])) == Segments([2, 3])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, FLOAT64)])
def test_the_torch_backend_in_float64(dtype, tolerance, assert_close):
    for name in DIFFERENTIABLE:
        operands = OPERATIONS[name].operands(7)
        expected = computed(name, operands, "reference", dtype)
        for these, those in zip(computed(name, operands, "torch", dtype), expected, strict=True):
            for a, e in zip(these, those, strict=True):
                assert_close(a.double(), e.double(), tolerance)
