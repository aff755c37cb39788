"""Dense product, output by output: y_n = sum_k x_k W_nk."""

from torch import Tensor


def linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T; shapes as in `nemotron3.ops.linear.api.linear`."""
    return (x.unsqueeze(-2) * weight).sum(-1)
