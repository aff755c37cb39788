"""CUDA graphs: the kernels of a function, captured once and launched again as a whole.

A decoding step has hundreds of kernels of a few microseconds each, and the host takes longer to
launch one than the device to run it. A `CudaGraph` contains the kernels that a function launches,
with the addresses that they read and write; `replay` launches all of them at once. So results are
in the same tensors each time, inputs must be written into the tensors that the function read, and
the function must not make the host read a value from the device.

    step()                              # compiles kernels and makes workspaces
    graph = pool.capture(step)         # launches no kernel
    x.copy_(other)
    graph.replay()                     # graph.results are those of `other`
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Results = tuple[Tensor, ...]


class CudaGraph:
    """The captured kernels of one function, and its results."""

    def __init__(self, function: Callable[[], Results], pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Other threads, such as those of a server, may use the device during the capture.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.results = function()

    def replay(self) -> None:
        """Launch all kernels again."""
        self._graph.replay()


class CudaGraphPool:
    """Captures graphs that share memory: results are valid until another graph is replayed."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, function: Callable[[], Results]) -> CudaGraph:
        """Capture a function that has run before."""
        return CudaGraph(function, self._pool)


def cuda_graph_pool(device: torch.device) -> CudaGraphPool | None:
    """A pool for a model's steps if they can be captured: on a GPU, with Triton kernels.

    PyTorch's own operations read lengths and indices on the host. Returns None otherwise.
    """
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    return CudaGraphPool()
