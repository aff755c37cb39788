"""What tests of compiled operations share."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from nemotron3.ops import native
from tests.ops.contract import outputs_and_gradients
from tests.tolerances import FLOAT32

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
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(outputs_and_gradients(call("native"), narrow))
    finally:
        torch.set_num_threads(threads)
    for one, two, three, wanted in zip(*results, expected, strict=True):
        assert_close(one, wanted, FLOAT32)
        assert torch.equal(one, two)
        assert torch.equal(one, three)
