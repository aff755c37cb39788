"""Requirements of compiled kernels, in Triton and C++, on their operands.

Triton kernels compute in float32, whatever the dtypes that they read and write. Float64 operands
are refused rather than rounded: a caller that passes float64 needs its precision.
"""

import os

import torch
from torch import Tensor

from nemotron3.errors import BackendUnavailableError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, whose bfloat16 products are wrong."""


def contiguous_rows(x: Tensor) -> Tensor:
    """`x` itself where its last axis is contiguous (a slice of columns is), else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def require_kernel_dtypes(operation: str, *operands: Tensor | None) -> None:
    """Refuse dtypes that the kernels would round."""
    for operand in operands:
        if operand is not None and operand.dtype == torch.float64:
            raise BackendUnavailableError(
                f"the triton backend of {operation!r} computes in float32, and an operand is "
                "float64; use backend='torch'"
            )
