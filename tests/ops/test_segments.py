"""Boundaries of packed sequences and the index tensors derived from them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron3.ops.segments import Segments

CPU = torch.device("cpu")


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8))
def test_index_tensors_agree_with_the_lengths(lengths):
    segments = Segments(lengths)
    assert segments == Segments.from_cu_seqlens(segments.cu_seqlens(CPU))
    rows = [(i, p) for i, n in enumerate(lengths) for p in range(n)]
    assert segments.ids(CPU).tolist() == [i for i, _ in rows]
    assert segments.positions(CPU).tolist() == [p for _, p in rows]
    assert segments.last_indices(CPU).tolist() == [
        t for t, (i, p) in enumerate(rows) if p == lengths[i] - 1
    ]
    assert (segments.uniform_length is not None) == (len(set(lengths)) == 1)


def test_an_empty_segment_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        Segments((3, 0))
