"""Copying rows: C++ against PyTorch, bit for bit, whatever the rows are made of."""

import pytest
import torch

from nemotron3.ops.gather import copy_rows
from tests.ops.native import needs_compiler


def _pairs(dtypes, rows, width):
    generator = torch.Generator().manual_seed(0)

    def some(count, dtype):
        return torch.randint(-99, 99, (count, *width), generator=generator).to(dtype)

    return [some(5, dtype) for dtype in dtypes], [some(rows, dtype) for dtype in dtypes]


@needs_compiler
@pytest.mark.parametrize("width", [(1,), (3, 5), (33, 64)])
@pytest.mark.parametrize("to", [[2], [4, 0, 3]])
def test_native_copies_as_pytorch_does(width, to):
    dtypes = [torch.float32, torch.int8, torch.float16, torch.float32]
    targets, sources = _pairs(dtypes, 7, width)
    expected = [target.clone() for target in targets]
    to, places = torch.tensor(to), torch.tensor([6, 1, 1][: len(to)])
    copy_rows(targets, to, sources, places, backend="native")
    copy_rows(expected, to, sources, places, backend="reference")
    for mine, wanted in zip(targets, expected, strict=True):
        assert torch.equal(mine, wanted)
        assert torch.equal(mine[1], wanted[1])


def test_of_no_tensors_nothing_is_copied():
    copy_rows([], torch.tensor([0]), [], torch.tensor([0]))
