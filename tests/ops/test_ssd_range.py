"""The scan over all sizes that float32 holds: nothing overflows on the way to a finite result."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import tests.ops.interpreter  # noqa: F401 - before any kernel is imported
from nemotron3.ops.segments import Segments
from nemotron3.ops.ssd import ssd
from tests.ops.contract import outputs_and_gradients
from tests.ops.native import needs_compiler
from tests.ops.test_ssd import operands
from tests.tolerances import FLOAT32, FLOAT64

MOST = 1e30
"""Of any result and of any product on the way to it, far enough from float32's 3e38 for sums."""
NAMES = ("y", "final", "dx", "ddt", "dA", "dB", "dC", "dD", "dinitial")
OF_DECAYS = ("ddt", "dA")
"""Sums of terms of both signs, which may cancel: in float32 hardly a digit may be left
of them, and where the terms are infinite no number."""


def magnitudes(least: int, most: int) -> st.SearchStrategy[float]:
    return st.sampled_from([0.0, 1.0]) | st.floats(least, most).map(lambda e: 10.0**e)


@st.composite
def scans(draw: st.DrawFn, longest: int, *, mixed: bool = True) -> "Scan":
    """Operands whose steps and rates differ by head and, where they are mixed, by token."""
    lengths = draw(st.lists(st.integers(1, longest), min_size=1, max_size=3))
    chunk_size = draw(st.sampled_from([1, 4, 16, 128]))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    x, dt, A, B, C, D, initial = operands(lengths, heads=4, head_dim=3, groups=2, d_state=5)
    dt *= torch.tensor([draw(magnitudes(-37, 37)) for _ in range(4)])
    A *= torch.tensor([draw(magnitudes(-37, 37)) for _ in range(4)])
    for _ in range(draw(st.integers(0, 2 * mixed))):
        dt[draw(st.integers(0, len(x) - 1))] = draw(magnitudes(-37, 37))
    x *= draw(magnitudes(-30, 30))
    B *= draw(magnitudes(-5, 5))
    C *= draw(magnitudes(-5, 5))
    initial *= draw(magnitudes(-30, 30))
    scan = Scan(lengths, chunk_size, [t.float().double() for t in (x, dt, A, B, C, D, initial)])
    assume(scan.largest < MOST)
    return scan


class Scan:
    """A scan, and what the recurrence in float64 makes of it."""

    def __init__(self, lengths: list[int], chunk_size: int, inputs: list[Tensor]) -> None:
        self.segments, self.chunk_size, self.inputs = Segments(lengths), chunk_size, inputs
        self.expected = self.run("reference", torch.float64)
        x, dt, _, B, C, *_ = inputs
        term = dt.max() * x.abs().max() * B.abs().max() * max(C.abs().max().item(), 1.0)
        results = [t.abs().max() for t in (dt, *self.expected)]
        self.decay_terms = (term * dt.max()).item()
        self.decays_may_overflow = self.decay_terms > MOST
        self.largest = torch.stack([term, *results]).nan_to_num(torch.inf).max().item()

    def __repr__(self) -> str:
        return f"Scan({self.segments}, {self.chunk_size}, {self.inputs})"

    def run(self, backend: str, dtype: torch.dtype) -> list[Tensor]:
        """Outputs and gradients, in the order of `NAMES`."""

        def call(*t: Tensor) -> tuple[Tensor, Tensor]:
            return ssd(
                *t[:6], segments=self.segments, chunk_size=self.chunk_size,
                initial_states=t[6], backend=backend,
            )  # fmt: skip

        return outputs_and_gradients(call, [t.to(dtype) for t in self.inputs])

    def check(
        self, backend: str, dtype: torch.dtype = torch.float32, tolerance: float = FLOAT32
    ) -> None:
        """Hold a backend to the recurrence."""
        # A gradient whose terms cancel has the rounding of its terms, not of what is left of them.
        floor = max(1e-3 * max(e.abs().max().item() for e in self.expected if e.numel()), 1e-30)
        for name, a, e in zip(NAMES, self.run(backend, dtype), self.expected, strict=True):
            if name in OF_DECAYS and dtype == torch.float32:
                assert self.decays_may_overflow or torch.isfinite(a).all(), name
                continue
            assert torch.isfinite(a).all(), name
            scale = max(e.abs().max().item(), floor)
            if name in OF_DECAYS:  # rounded like their terms, whatever is left of those
                scale = max(scale, self.decay_terms)
            worst = (a.double() - e).abs().max().item() / scale
            assert worst <= tolerance, f"{name} differs by {worst:.1e} of {scale:.1e}"


settings_of_scans = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)


@pytest.mark.slow
@settings_of_scans
@given(scans(longest=40))
def test_torch(scan):
    scan.check("torch")
    scan.check("torch", torch.float64, FLOAT64)


@pytest.mark.slow
@needs_compiler
@settings_of_scans
@given(scans(longest=100))
def test_native(scan):
    scan.check("native")


@pytest.mark.slow
@settings(settings_of_scans, max_examples=20)
@given(scans(longest=20, mixed=False))
def test_triton(scan):
    """Its running sums are float32: a small step is as exact as the large ones before it.

    What a kernel leaves out it may have computed: a product there may overflow, and NumPy, which
    the interpreter computes with, would warn.
    """
    with np.errstate(over="ignore"):
        scan.check("triton")


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_compiler)])
@pytest.mark.parametrize("A", [-1.24, -1.25, -1.3, -5.0])
def test_large_operands_at_any_steepness(A, backend):
    """On both sides of the limit where the scaled product gives way to the matrix of decays."""
    x, ones = torch.full((256, 1, 1), 20.0), torch.ones(256, 1)
    B = torch.full((256, 1, 1), 3.0)
    inputs = [x, ones, torch.tensor([A]), B, B, torch.zeros(1), torch.zeros(1, 1, 1, 1)]
    Scan([256], 128, [t.double() for t in inputs]).check(backend)
