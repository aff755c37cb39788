"""CUDA graphs: the kernels of a function, captured once and launched again as a whole.

A decoding step is some hundreds of kernels of a few microseconds each, and the host needs longer to
launch one than the device to run it. A `CudaGraph` keeps the kernels that a function launches, with
the addresses that they read and write; `replay` launches all of them at once. So results are in the
same tensors each time, inputs are written into the tensors that the function read, and nothing may
depend on a value that the host reads.

    step()                              # compiles kernels and makes workspaces
    graph = pool.capture(step)         # launches nothing
    x.copy_(other)
    graph.replay()                    # graph.results are those of `other`
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Results = tuple[Tensor, ...]


class CudaGraph:
    """The launches of one function."""

    def __init__(self, function: Callable[[], Results], pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Other threads (a server's) may use the device meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.results = function()

    def replay(self) -> None:
        """Launch it again."""
        self._graph.replay()


class CudaGraphPool:
    """Captures graphs that share memory, so results are good until another of them is replayed."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, function: Callable[[], Results]) -> CudaGraph:
        """Capture a function that has run before."""
        return CudaGraph(function, self._pool)


def cuda_graph_pool(device: torch.device) -> CudaGraphPool | None:
    """A pool for a model's steps where they can be captured: on a GPU, with kernels of Triton.

    PyTorch's own way reads lengths and indices on the host.
    """
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    return CudaGraphPool()
