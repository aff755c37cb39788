"""Graphs of model calls on a carried state, one for each shape of call.

On a CPU the first call of a shape runs the function and records it (ops/graph.py). On a GPU the
function first runs on padding only, and is then captured (runtime/cuda_graph.py). Later calls copy
their inputs over the first ones and replay the graph, with the same results to the last bit. A
graph is valid only for the memory of cache and parameters with which it was made: if the cache's
memory has grown, a new graph is made, and code that replaces the model's tensors must call `clear`.
"""

from collections.abc import Callable, Hashable
from typing import NamedTuple, Protocol

from torch import Tensor

from nemotron3.models.cache.hybrid_cache import HybridCache
from nemotron3.ops.graph import Graph, can_record

MAX_GRAPHS = 64
"""Most graphs of one cache; each has memory for the results of a call."""

Tensors = tuple[Tensor, ...]


class CapturedGraph(Protocol):
    """The operations of a function on a device, to be replayed on the same memory."""

    @property
    def results(self) -> Tensors:
        """The function's results; `replay` overwrites them."""
        ...

    def replay(self) -> None:
        """Execute the operations again."""
        ...


class GraphPool(Protocol):
    """Captures functions on a device, such as `runtime.cuda_graph.CudaGraphPool`."""

    def capture(self, function: Callable[[], Tensors]) -> CapturedGraph:
        """Capture the operations of a function that has run before, without executing them."""
        ...


class _CachedGraph(NamedTuple):
    graph: Graph | CapturedGraph
    inputs: Tensors
    outputs: Tensors


class GraphCache:
    """The graphs of one `HybridCache`: captured in `pool` if there is one, else recorded."""

    def __init__(self, cache: HybridCache, pool: GraphPool | None) -> None:
        self._cache = cache
        self._kept: dict[Hashable, _CachedGraph] = {}
        self._addresses = cache.addresses()
        self._pool = pool
        self.is_supported = self.pads_batch or can_record(
            (cache.dtype, cache.keys_dtype), cache.device
        )
        """Whether model calls on this cache can be captured or recorded."""

    @property
    def pads_batch(self) -> bool:
        """Whether batches are padded by sequences in slot -1, so that few shapes suffice."""
        return self._pool is not None

    def has(self, shape: Hashable) -> bool:
        """Whether there is a valid graph for calls of this shape."""
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
        """The results of `function(*inputs)`, valid until the next call.

        `padding_inputs` returns inputs of the same shapes that are only padding; a CUDA graph is
        captured on them.
        """
        if self.has(shape):
            cached = self._kept.pop(shape)
            _replay(cached, inputs)
        else:
            if self._pool is None:
                cached = _record(inputs, function)
            else:
                assert padding_inputs is not None, (
                    "a capture on other inputs than padding would change the carried state"
                )
                cached = self._capture(self._pool, padding_inputs(), function)
                _replay(cached, inputs)
            self.has(shape)  # the call may have made the cache grow
            if len(self._kept) == MAX_GRAPHS:
                del self._kept[next(iter(self._kept))]
        self._kept[shape] = cached  # in the order of use: the least recently used is dropped first
        return cached.outputs

    def clear(self) -> None:
        """Drop all graphs, because the model's parameters are other tensors."""
        self._kept.clear()

    def _capture(
        self, pool: GraphPool, padding_inputs: Tensors, function: Callable[..., Tensors]
    ) -> _CachedGraph:
        """Run once, then capture: a capture cannot compile kernels or allocate lasting memory."""
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
