"""Fixtures for every test: few threads, a fixed seed, and uninitialised memory that hurts."""

import os
from collections.abc import Iterator

# Two workers share two cores; spinning OpenMP threads would cost tenfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings
from torch import Tensor

# Without a GPU the kernels run in Triton's interpreter, which must be selected before any import of
# Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# CI repeats the same examples, so that a change is judged by what it changed; a developer's run
# explores. Deadlines would time a shared machine, not the code.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("developer", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "developer")


@pytest.fixture(autouse=True)
def _settled_machine() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill `torch.empty` with NaN, so that reads of uninitialised memory are detected."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def assert_close():
    """Largest absolute difference, relative to the scale of what is expected."""

    def check(actual: Tensor, expected: Tensor, tolerance: float) -> None:
        assert actual.shape == expected.shape
        assert torch.isfinite(actual).all()
        scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
        worst = (actual - expected).abs().max().item() / scale if expected.numel() else 0.0
        assert worst <= tolerance, f"differs by {worst:.2e} of the scale, allowed {tolerance:.0e}"

    return check
