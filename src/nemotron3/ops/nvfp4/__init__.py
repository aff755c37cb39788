"""NVFP4: tensors of four bits an element, with scales for blocks of 16 and for the whole."""

from nemotron3.ops.nvfp4.api import Scales, fake_quantize, quantize
from nemotron3.ops.nvfp4.hadamard import SIGNS, hadamard
from nemotron3.ops.nvfp4.ms_eden import fake_ms_eden, ms_eden, random_signs
from nemotron3.ops.nvfp4.reference import Kind
from nemotron3.ops.nvfp4.tensor import BLOCK, Block, NVFP4Tensor, pack, unpack

__all__ = [
    "BLOCK",
    "SIGNS",
    "Block",
    "Kind",
    "NVFP4Tensor",
    "Scales",
    "fake_ms_eden",
    "fake_quantize",
    "hadamard",
    "ms_eden",
    "pack",
    "quantize",
    "random_signs",
    "unpack",
]
