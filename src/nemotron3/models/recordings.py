"""Recordings of what a model does on a carried state, by the shape of the call.

On a CPU the first call of a shape runs the function and records it (ops/graph.py); on a GPU the
function runs on padding alone and is captured (parallel/capture.py). Those after it copy their
inputs over the first one's and play the recording, which has the same bits. A recording stands on
the memory of the cache and of the parameters: when the cache's grows a new one is made, and
`forget` is for whoever puts other tensors into the model.
"""

from collections.abc import Callable, Hashable
from typing import NamedTuple

from torch import Tensor

from nemotron3.models.cache import HybridCache
from nemotron3.ops.graph import Graph, can_record
from nemotron3.parallel.capture import Capture, Captures, can_capture

MAX_RECORDINGS = 64
"""Shapes that are remembered; each holds the memory of a call's results."""

Tensors = tuple[Tensor, ...]


class _Recording(NamedTuple):
    graph: Graph | Capture
    inputs: Tensors
    outputs: Tensors


class Recordings:
    """The recordings of one function on one cache."""

    def __init__(self, cache: HybridCache) -> None:
        self._cache = cache
        self._kept: dict[Hashable, _Recording] = {}
        self._addresses = cache.addresses()
        self._captures = Captures() if can_capture(cache.device) else None
        self.are_possible = self.take_padding or can_record(cache.keys_dtype, cache.device)
        """Whether what a model does on such a cache can be recorded."""

    @property
    def take_padding(self) -> bool:
        """Whether a sequence may be padding (slot -1), so that few shapes serve all calls."""
        return self._captures is not None

    def find(self, shape: Hashable) -> bool:
        """Whether a call of this shape would be played."""
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
        idle: Callable[[], Tensors] | None = None,
    ) -> Tensors:
        """`function(*inputs)`; the results are good until the next call.

        `idle` makes inputs like those given, of padding alone, which a capture cannot do without.
        """
        if self.find(shape):
            recording = self._kept.pop(shape)
            _play(recording, inputs)
        else:
            if self._captures is None:
                recording = _record(inputs, function)
            else:
                assert idle is not None, "a capture would write into the state that it runs on"
                recording = self._capture(self._captures, idle(), function)
                _play(recording, inputs)
            self.find(shape)  # the call may have made the cache grow
            if len(self._kept) == MAX_RECORDINGS:
                del self._kept[next(iter(self._kept))]
        self._kept[shape] = recording  # the last one used is the last to go
        return recording.outputs

    def forget(self) -> None:
        """Record anew: the model's parameters are other tensors."""
        self._kept.clear()

    def _capture(
        self, captures: Captures, idle: Tensors, function: Callable[..., Tensors]
    ) -> _Recording:
        """Run it once, since a capture can neither compile kernels nor make memory that stays."""
        inputs = tuple(given.to(self._cache.device, copy=True) for given in idle)
        function(*inputs)
        capture = captures.of(lambda: function(*inputs))
        return _Recording(capture, inputs, capture.results)


def _record(inputs: Tensors, function: Callable[..., Tensors]) -> _Recording:
    inputs = tuple(given.clone() for given in inputs)
    graph = Graph()
    with graph.record():
        outputs = function(*inputs)
    return _Recording(graph, inputs, outputs)


def _play(recording: _Recording, inputs: Tensors) -> None:
    for held, given in zip(recording.inputs, inputs, strict=True):
        held.copy_(given)
    recording.graph.replay()
