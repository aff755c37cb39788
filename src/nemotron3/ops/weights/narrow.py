"""Weights in bfloat16 beside activations in float32, and the other way round.

Compiled products read such a weight as it is, and compute the same as with its float32 copy, to the
bit: bfloat16 is the upper half of a float32. A decoding step then reads half the bytes, and of the
output layer of a large vocabulary there is no second copy. Gradients take the copy.

Likewise a weight in float32 beside activations in bfloat16, as in training: compiled products round
it as they read it, so there is no copy, and its gradient is not rounded.
"""

import torch
from torch import Tensor

from nemotron3.ops import native


def is_narrow(weight: Tensor, x: Tensor) -> bool:
    """Whether a weight is bfloat16 and its activations are float32."""
    return weight.dtype == torch.bfloat16 and x.dtype == torch.float32


def is_read_as_stored(weight: Tensor, x: Tensor) -> bool:
    """Whether products read this weight without a copy in the dtype of the activations."""
    return is_read_wide(weight, x) or is_read_narrow(weight, x)


def is_read_wide(weight: Tensor, x: Tensor) -> bool:
    """Whether products round this weight to the bfloat16 of the activations as they read it."""
    if weight.dtype != torch.float32 or x.dtype != torch.bfloat16:
        return False
    return x.is_cpu and native.available()


def is_read_narrow(weight: Tensor, x: Tensor) -> bool:
    """Whether products read this weight without a float32 copy."""
    if not is_narrow(weight, x) or not x.is_cpu or not native.available():
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
