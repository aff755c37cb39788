"""Graphs of what a model does on a carried state, by the shape of the call.

On a CPU the first call of a shape runs the function and records it (ops/graph.py); on a GPU the
function runs on padding alone and is captured (runtime/cuda_graph.py). Those after it copy their
inputs over the first one's and replay the graph, which has the same bits. A graph stands on the
memory of the cache and of the parameters: when the cache's grows a new one is made, and `clear` is
for whoever puts other tensors into the model.
"""

from collections.abc import Callable, Hashable
from typing import NamedTuple, Protocol

from torch import Tensor

from nemotron3.models.cache.hybrid_cache import HybridCache
from nemotron3.ops.graph import Graph, can_record

MAX_GRAPHS = 64
"""Shapes that are kept; each holds the memory of a call's results."""

Tensors = tuple[Tensor, ...]


class CapturedGraph(Protocol):
    """What a device does for a function, to be done again on the same memory."""

    @property
    def results(self) -> Tensors:
        """What the function returned; `replay` writes it anew."""
        ...

    def replay(self) -> None:
        """Do it again."""
        ...


class GraphPool(Protocol):
    """Captures functions for a device: `runtime.cuda_graph.CudaGraphPool` does."""

    def capture(self, function: Callable[[], Tensors]) -> CapturedGraph:
        """Note what a function that has run before does, without doing it."""
        ...


class _CachedGraph(NamedTuple):
    graph: Graph | CapturedGraph
    inputs: Tensors
    outputs: Tensors


class GraphCache:
    """The graphs of one cache: captured in `pool` where there is one, else recorded."""

    def __init__(self, cache: HybridCache, pool: GraphPool | None) -> None:
        self._cache = cache
        self._kept: dict[Hashable, _CachedGraph] = {}
        self._addresses = cache.addresses()
        self._pool = pool
        self.is_supported = self.pads_batch or can_record(cache.keys_dtype, cache.device)
        """Whether what a model does on such a cache can be recorded."""

    @property
    def pads_batch(self) -> bool:
        """Whether sequences in slot -1 pad batches, so that few shapes serve all calls."""
        return self._pool is not None

    def has(self, shape: Hashable) -> bool:
        """Whether there is a graph for calls of this shape."""
        addresses = self._cache.addresses()
        if addresses != self._addresses:
            self._kept.clear()
            self._addresses = addresses
        return shape in self._kept

    def run(
        self,
        shape: Hashable,
        inputs: Tensors,
        function: Callable[..., Tensors],
        *,
        padding_inputs: Callable[[], Tensors] | None = None,
    ) -> Tensors:
        """`function(*inputs)`; the results are good until the next call.

        `padding_inputs` makes inputs like those given, of padding alone: what a CUDA graph is
        captured on.
        """
        if self.has(shape):
            cached = self._kept.pop(shape)
            _replay(cached, inputs)
        else:
            if self._pool is None:
                cached = _record(inputs, function)
            else:
                assert padding_inputs is not None, (
                    "a capture would write into the state that it runs on"
                )
                cached = self._capture(self._pool, padding_inputs(), function)
                _replay(cached, inputs)
            self.has(shape)  # the call may have made the cache grow
            if len(self._kept) == MAX_GRAPHS:
                del self._kept[next(iter(self._kept))]
        self._kept[shape] = cached  # the last one used is the last to go
        return cached.outputs

    def clear(self) -> None:
        """Record anew: the model's parameters are other tensors."""
        self._kept.clear()

    def _capture(
        self, pool: GraphPool, padding_inputs: Tensors, function: Callable[..., Tensors]
    ) -> _CachedGraph:
        """Run it once, since a capture can neither compile kernels nor make memory that stays."""
        inputs = tuple(given.to(self._cache.device, copy=True) for given in padding_inputs)
        function(*inputs)
        graph = pool.capture(lambda: function(*inputs))
        return _CachedGraph(graph, inputs, graph.results)


def _record(inputs: Tensors, function: Callable[..., Tensors]) -> _CachedGraph:
    inputs = tuple(given.clone() for given in inputs)
    graph = Graph()
    with graph.record():
        outputs = function(*inputs)
    return _CachedGraph(graph, inputs, outputs)


def _replay(cached: _CachedGraph, inputs: Tensors) -> None:
    for held, given in zip(cached.inputs, inputs, strict=True):
        held.copy_(given)
    cached.graph.replay()
