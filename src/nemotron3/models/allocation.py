"""Memory for a model that was built without any.

Models are described on the meta device, where a parameter has a shape and no bytes, and get their
memory once it is known where they go and in what dtype. A few parameters stay in float32 whatever
the rest is kept in: the scan's own, whose rounding the state sums up over the whole sequence, and
the router's selection bias, whose rounding changes which experts are chosen.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

ALWAYS_FLOAT32 = ("A_log", "D", "dt_bias", "e_score_correction_bias")
"""Last parts of the names of these parameters."""


def allocate(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give every parameter and buffer uninitialised memory, in the dtype it is kept in."""
    for module in model.modules():
        for name, tensor in _own_tensors(module):
            kept = torch.promote_types(dtype, torch.float32) if name in ALWAYS_FLOAT32 else dtype
            fresh = torch.empty(tensor.shape, dtype=kept, device=device)
            if isinstance(tensor, nn.Parameter):
                setattr(module, name, nn.Parameter(fresh))
            else:
                # No published layout of a softmax router has the bias, so nothing would fill it.
                module.register_buffer(name, fresh.zero_())


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from list(module.named_parameters(recurse=False))
    yield from list(module.named_buffers(recurse=False))
