"""Recording the operations of a function on the CPU, to replay them without the function.

A decoding step of a small model is a few hundred operations of some microseconds each, and the
Python that calls them takes longer than the operations. A `Graph` runs the function once, keeps
every operation with its operands and results, and replays them on the same memory: the CPU
counterpart of a CUDA graph. Before a replay, the caller writes the new inputs into the recorded
tensors; afterwards it reads the results from the recorded outputs.

    graph = Graph()
    with graph.record():
        y = f(x)
    x.copy_(other)
    graph.replay()         # y is f(other)

Consecutive compiled operations become a `Program`, which one team of threads runs without returning
to Python; PyTorch's operations are called as they were. Decisions that the function makes from
shapes or values are fixed by the recording, so reading a value is refused where PyTorch makes that
visible. Input indices (tokens, slots, lengths) differ in each replay, and a replay checks them
against the bounds that the operations require.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nemotron3.ops import native
from nemotron3.ops.checks import WatchedIndices, check_indices, watching_indices
from nemotron3.ops.native import GraphNode, ParallelKernel, Program

_READS_VALUES = {
    f"aten::{name}"
    for name in ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "allclose")
}
_SOURCE = Path(native.__file__).with_name("program.cpp")
_add = {t: ParallelKernel(_SOURCE, f"add_{native.name_of(t)}", "ppp i") for t in native.FLOATS}
_embedding = {
    t: ParallelKernel(_SOURCE, f"embedding_{native.name_of(t)}", "ppp ii") for t in native.FLOATS
}
_cast = {
    t: ParallelKernel(_SOURCE, f"cast_to_{native.name_of(t)}", "pp iii") for t in native.FLOATS
}


class Graph:
    """A sequence of operations on fixed memory."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []
        self._watched: list[WatchedIndices] = []

    @contextmanager
    def record(self) -> Iterator[None]:
        """Record the operations inside the `with` block, which must not require gradients."""
        assert not torch.is_grad_enabled(), "a graph has no gradients"
        calls: list[Any] = []
        watched: list[WatchedIndices] = []
        recorder = _Recorder(calls)
        with native.recording(calls), recorder, watching_indices(watched):
            yield
        self._steps = _fuse_calls(calls)
        self._watched = _input_indices(watched, recorder.made)

    def replay(self) -> None:
        """Run all operations again. Raises OperandIndexError for an index out of range."""
        for watched in self._watched:
            watched.check_again()
        for step in self._steps:
            step()


def _fuse_calls(calls: list[Any]) -> list[Callable[[], object]]:
    """Join consecutive compiled calls into one program."""
    steps: list[Callable[[], object]] = []
    row: list[GraphNode] = []
    for call in [*calls, None]:
        if isinstance(call, GraphNode):
            row.append(call)
            continue
        if row:
            steps.append(Program(row))
            row = []
        if call is not None:
            steps.append(call)
    return steps


def _input_indices(watched: list[WatchedIndices], made: set[int]) -> list[WatchedIndices]:
    """The index tensors that are inputs of the recording, each once, without those it computes."""
    found: dict[Any, WatchedIndices] = {}
    for each in watched:
        indices = each.indices
        if indices.untyped_storage().data_ptr() not in made:
            place = (indices.data_ptr(), indices.shape, indices.stride(), each.bounds)
            found.setdefault(place, each)
    return list(found.values())


class _Recorder(TorchDispatchMode):
    """Records PyTorch's operations; compiled ones record themselves."""

    def __init__(self, calls: list[Any]) -> None:
        super().__init__()
        self.calls = calls
        self.made: set[int] = set()
        """Addresses of tensors that the recording created."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing here is compiled. PyTorch's default would import its compiler to skip it, which
        # would delay the first answer by seconds.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in _READS_VALUES:
            raise RuntimeError(f"{name} reads the value of a tensor; a graph cannot record that")
        compiled = _compiled(name, args, kwargs)
        if compiled is not None:
            self._note_made([compiled])
            return compiled
        result = func(*args, **kwargs)
        call = partial(func, *args, **kwargs)
        if func._schema.is_mutable:
            self.calls.append(call)
            return result
        outputs = _tensors(result)
        operands = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if outputs and not _shares_memory(outputs[0], operands):
            self._note_made(outputs)
            if "empty" not in name:
                self.calls.append(partial(_rerun, call, outputs))
        return result

    def _note_made(self, outputs: list[Tensor]) -> None:
        self.made.update(output.untyped_storage().data_ptr() for output in outputs)


def _compiled(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """The result of a compiled operation with the same bits, or None if there is none."""
    if name == "aten::_to_copy" and kwargs.keys() <= {"dtype"}:
        return _compiled_cast(args[0], kwargs.get("dtype"))
    if kwargs or len(args) != 2 or not all(isinstance(a, Tensor) for a in args):
        return None
    a, b = args
    if not (a.is_contiguous() and b.is_contiguous() and native.supports(a, native.FLOATS)):
        return None
    if name == "aten::add" and b.is_cpu and b.dtype == a.dtype and a.shape == b.shape:
        y = torch.empty_like(a)
        _add[a.dtype](a, b, y, a.numel(), work=a.numel())
        return y
    if name == "aten::embedding" and b.dtype == torch.int64 and b.device == a.device:
        bounds, hint = (0, len(a)), ", the tokens of the vocabulary"
        check_indices("embedding", "tokens", b, b.shape, a, bounds, hint)
        y = a.new_empty(*b.shape, a.shape[1])
        _embedding[a.dtype](a, b, y, b.numel(), a.shape[1], work=y.numel())
        return y
    return None


def _compiled_cast(x: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """The same for a cast between float32 and bfloat16; rows of `x` may be apart."""
    is_narrowed_or_widened = dtype in native.FLOATS and native.supports(x, native.FLOATS)
    if not is_narrowed_or_widened or dtype is None or dtype == x.dtype or not x.numel():
        return None
    if x.is_contiguous():
        rows, columns, ld = 1, x.numel(), x.numel()
    elif x.dim() == 2 and x.stride(1) == 1:
        (rows, columns), ld = x.shape, x.stride(0)
    else:
        return None
    y = torch.empty(x.shape, dtype=dtype)
    _cast[dtype](x, y, rows, columns, ld, work=x.numel())
    return y


def _rerun(call: Callable[[], Any], outputs: list[Tensor]) -> None:
    """Run an operation that returns new tensors, and copy them into the recorded outputs."""
    for old, new in zip(outputs, _tensors(call()), strict=True):
        old.copy_(new)


def _tensors(result: Any) -> list[Tensor]:
    """The tensors that an operation returned."""
    if isinstance(result, Tensor):
        return [result]
    return [t for t in result if isinstance(t, Tensor)] if isinstance(result, tuple | list) else []


def _shares_memory(result: Tensor, operands: list[Tensor]) -> bool:
    """Whether a result is a view, or an operand itself."""
    memory = result.untyped_storage().data_ptr()
    return any(memory == operand.untyped_storage().data_ptr() for operand in operands)


def can_record(dtypes: Sequence[torch.dtype], device: torch.device) -> bool:
    """Whether a model's operations on tensors of these dtypes can be recorded.

    The compiled operations can: they make no decision in Python. PyTorch's routing of tokens to
    experts does.
    """
    operands = [torch.empty(0, dtype=dtype, device=device) for dtype in dtypes]
    return native.available() and all(native.supports(t, native.FLOATS) for t in operands)
