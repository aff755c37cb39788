"""Exceptions of a part after which the next part still runs."""

from nemotron3.errors import BackendUnavailableError


def kernel_errors() -> tuple[type[Exception], ...]:
    """Errors of PyTorch, of the device, of Triton, of operands, and of other programs."""
    from triton.errors import TritonError  # noqa: PLC0415 - Triton is imported when a kernel is

    return (
        RuntimeError, ValueError, TypeError, AttributeError, AssertionError, ImportError, OSError,
        TritonError, BackendUnavailableError,
    )  # fmt: skip
