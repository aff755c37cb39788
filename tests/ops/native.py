"""What tests of compiled operations share."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from nemotron3.ops import native
from tests.ops.contract import outputs_and_gradients
from tests.tolerances import BFLOAT16, FLOAT32

needs_compiler = pytest.mark.skipif(
    not native.available(), reason="there is no C++ compiler here, or NEMOTRON3_NATIVE is 0"
)


def assert_native_equals_reference(
    call: Callable[[str], Callable[..., Sequence[Tensor]]], inputs: Sequence[Tensor], assert_close
) -> None:
    """Outputs and gradients of `call("native")` in float32 against `call("reference")` in float64.

    `inputs` are float64; the bits must not depend on the number of threads.
    """
    expected = outputs_and_gradients(call("reference"), inputs)
    narrow = [t.float() if t.is_floating_point() else t for t in inputs]
    results = _on_any_threads(lambda: outputs_and_gradients(call("native"), narrow))
    for ours, wanted in zip(results, expected, strict=True):
        assert_close(ours, wanted, FLOAT32)


def assert_bfloat16_equals_reference(
    call: Callable[[str], Callable[..., Sequence[Tensor]]],
    inputs: Sequence[Tensor],
    assert_close,
    *,
    wide: Sequence[int] = (),
) -> None:
    """Outputs and gradients of `call("native")` in bfloat16 against float64 of the same numbers.

    `inputs` are rounded to bfloat16 beforehand; those at the positions `wide` are given as float32,
    as master weights are, and then their gradients are float32. The bits must not depend on the
    number of threads.
    """
    rounded = [t.bfloat16() for t in inputs]
    narrow = [t.float() if i in wide else t for i, t in enumerate(rounded)]
    expected = _values_and_gradients(call("reference"), [t.double() for t in rounded])
    results = _on_any_threads(lambda: _values_and_gradients(call("native"), narrow))
    gradients = results[-len(narrow) :]
    assert [g.dtype for g in gradients] == [t.dtype for t in narrow]
    for ours, wanted in zip(results, expected, strict=True):
        assert_close(ours.double(), wanted, BFLOAT16)


def _on_any_threads(compute: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    """The result of `compute`, whose bits are the same for every number of threads."""
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(compute())
    finally:
        torch.set_num_threads(threads)
    for one, two, three in zip(*results, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    return results[0]


def _values_and_gradients(
    call: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]
) -> list[Tensor]:
    """Outputs, and gradients for random gradients of the outputs that bfloat16 holds."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = call(*leaves)
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype) for y in outputs]
    torch.autograd.backward(outputs, given)
    gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
    return [*(y.detach() for y in outputs), *gradients]
