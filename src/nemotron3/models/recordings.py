"""Recordings of what a model does on a carried state, by the shape of the call.

The first call of a shape runs the function and records it; those after it copy their inputs over
the first one's and play the recording, which has the same bits. A recording stands on the memory of
the cache and of the parameters: when the cache's grows a new one is made, and `forget` is for
whoever puts other tensors into the model.
"""

from collections.abc import Callable, Hashable
from typing import NamedTuple

from torch import Tensor

from nemotron3.models.cache import HybridCache
from nemotron3.ops.graph import Graph, can_record

MAX_RECORDINGS = 64
"""Shapes that are remembered; each holds the memory of a call's results."""

Tensors = tuple[Tensor, ...]


class _Recording(NamedTuple):
    graph: Graph
    inputs: Tensors
    outputs: Tensors


class Recordings:
    """The recordings of one function on one cache."""

    def __init__(self, cache: HybridCache) -> None:
        self._cache = cache
        self._kept: dict[Hashable, _Recording] = {}
        self._addresses = cache.addresses()

    @property
    def are_possible(self) -> bool:
        """Whether what a model does on such a cache can be recorded."""
        return can_record(self._cache.dtype, self._cache.device)

    def find(self, shape: Hashable) -> bool:
        """Whether a call of this shape would be played."""
        addresses = self._cache.addresses()
        if addresses != self._addresses:
            self._kept.clear()
            self._addresses = addresses
        return shape in self._kept

    def run(self, shape: Hashable, inputs: Tensors, function: Callable[..., Tensors]) -> Tensors:
        """`function(*inputs)`; the results are good until the next call of this shape."""
        if self.find(shape):
            recording = self._kept.pop(shape)
            for held, given in zip(recording.inputs, inputs, strict=True):
                held.copy_(given)
            recording.graph.replay()
        else:
            inputs = tuple(given.clone() for given in inputs)
            graph = Graph()
            with graph.record():
                outputs = function(*inputs)
            recording = _Recording(graph, inputs, outputs)
            self.find(shape)  # the call may have made the cache grow
            if len(self._kept) == MAX_RECORDINGS:
                del self._kept[next(iter(self._kept))]
        self._kept[shape] = recording  # the last one used is the last to go
        return recording.outputs

    def forget(self) -> None:
        """Record anew: the model's parameters are other tensors."""
        self._kept.clear()
