"""Where sequences begin and end in a packed stream of tokens.

Tokens of many sequences lie one after another in tensors of shape [total_tokens, ...]; `Segments`
holds the lengths. Every operation that works along time (state-space scan, convolution, attention,
shifts) takes one, and none of them ever mixes two segments. Lengths are Python integers, because
shapes and loops depend on them; the index tensors are created on demand, once per device.

    segments = Segments((3, 5))           # two sequences, 8 tokens in all
    segments.cu_seqlens(device)           # tensor([0, 3, 8])
    segments.positions(device)            # tensor([0, 1, 2, 0, 1, 2, 3, 4])
"""

from collections.abc import Callable, Iterable
from itertools import accumulate, pairwise
from operator import index

import torch
from torch import Tensor


class Segments:
    """Lengths of the sequences in a packed stream, and the index tensors derived from them.

    Immutable. A length of zero is refused.
    """

    def __init__(self, lengths: Iterable[int]) -> None:
        self.lengths = tuple(map(index, lengths))
        if self.lengths and min(self.lengths) <= 0:
            raise ValueError(f"every segment needs at least one token, got lengths {self.lengths}")
        self.starts = tuple(accumulate(self.lengths, initial=0))
        self.total = self.starts[-1]
        self._cache: dict[tuple[str, torch.device], Tensor] = {}

    @classmethod
    def uniform(cls, count: int, length: int) -> "Segments":
        """`count` sequences of the same length, like an ordinary [batch, seq] tensor."""
        return cls((length,) * count)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor) -> "Segments":
        """From cumulative lengths [0, l0, l0 + l1, ...], `cu_seqlens` in flash-attention."""
        bounds = cu_seqlens.tolist()
        if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or bounds[:1] != [0]:
            raise ValueError(
                f"cu_seqlens is {bounds} of {cu_seqlens.dtype}; expected integers that begin at 0"
            )
        return cls(end - start for start, end in pairwise(bounds))

    def __len__(self) -> int:
        return len(self.lengths)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Segments) and self.lengths == other.lengths

    def __hash__(self) -> int:
        return hash(self.lengths)

    def __repr__(self) -> str:
        return f"Segments({self.lengths})"

    @property
    def uniform_length(self) -> int | None:
        """The common length, or None where lengths differ. A uniform stream can be reshaped."""
        return self.lengths[0] if len(set(self.lengths)) == 1 else None

    @property
    def max_length(self) -> int:
        """Length of the longest segment."""
        return max(self.lengths, default=0)

    def cu_seqlens(self, device: torch.device) -> Tensor:
        """Cumulative lengths, int64 [n_segments + 1]."""
        return self._cached("cu_seqlens", device, lambda: torch.tensor(self.starts))

    def ids(self, device: torch.device) -> Tensor:
        """Index of the segment that each token belongs to, int64 [total]."""
        return self._cached(
            "ids",
            device,
            lambda: torch.repeat_interleave(
                torch.arange(len(self)), torch.tensor(self.lengths, dtype=torch.int64)
            ),
        )

    def positions(self, device: torch.device) -> Tensor:
        """Position of each token within its segment, int64 [total]."""
        return self._cached(
            "positions", device, lambda: torch.cat([torch.arange(n) for n in (*self.lengths, 0)])
        )

    def last_indices(self, device: torch.device) -> Tensor:
        """Index in the stream of each segment's last token, int64 [n_segments]."""
        return self._cached("last_indices", device, lambda: torch.tensor(self.starts[1:]) - 1)

    def _cached(self, name: str, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        key = (name, device)
        if key not in self._cache:
            self._cache[key] = make().to(device)
        return self._cache[key]
