"""Dense products that round their activations to int8 (ops/weights/integer.py), in PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from nemotron3.ops.weights import IntegerWeight
from nemotron3.ops.weights.integer import BLOCK, round_to_int8, rounded_to_int8


def linear_int8_reference(x: Tensor, weight: IntegerWeight) -> Tensor:
    """Shapes as in `nemotron3.ops.linear.api.linear`.

    y = sum over blocks of (scale of x * scale of W) * the sum of products of integers.
    """
    codes, scales = round_to_int8(x)
    weight_codes, weight_scales = weight.integers()
    padding = (0, -x.shape[-1] % BLOCK)
    ours = F.pad(codes, padding).unflatten(-1, (-1, BLOCK)).to(torch.int32)
    theirs = F.pad(weight_codes, padding).unflatten(-1, (-1, BLOCK)).to(torch.int32)
    sums = torch.einsum("...bi,obi->...ob", ours, theirs)
    products = scales.unsqueeze(-2) * weight_scales.to(x.dtype)
    return (products * sums).sum(-1)


def linear_int8_torch(x: Tensor, weight: IntegerWeight) -> Tensor:
    """The product of the values that the integers stand for."""
    return F.linear(rounded_to_int8(x), weight.dequantize(x.dtype))
