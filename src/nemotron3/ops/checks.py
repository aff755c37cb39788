"""Checks of every operation's operands, made before a backend gets them.

Compiled functions and kernels read memory by the sizes that they are given, so a mistake that
PyTorch answers with an error would make them return wrong numbers or crash the process. The entry
point of each operation (`api.py`) therefore checks all operands once, and a mistake raises the same
error on every backend:

* `OperandError`, a RuntimeError: dtype, shape, device, memory layout;
* `OperandIndexError`, an IndexError: an index outside what it indexes;
* ValueError: a number or a name that is not a tensor (a number of groups, an activation).

Each check takes a fraction of a microsecond. Index values are checked on the CPU only; on a GPU the
check would wait for the device, so they are trusted. A recorded graph (graph.py) is replayed with
other indices in the same memory, so it keeps the bounds of its index inputs (`watching_indices`)
and checks them before each replay.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import chain
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nemotron3.errors import OperandError, OperandIndexError
from nemotron3.ops.segments import Segments

_FEW = 64
"""Up to this number, indices are read faster as a list than as a NumPy array."""
_INTEGERS = frozenset((torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8))

Shape = Sequence[int]


class Shaped(Protocol):
    """A tensor, or a weight in a number format of its own."""

    @property
    def shape(self) -> torch.Size:
        """Of its values."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it is."""
        ...


def check_axes(operation: str, name: str, t: Tensor, axes: str) -> None:
    """Refuse a tensor without the axes, such as "tokens head head_dim", or not floating-point."""
    if t.dim() != axes.count(" ") + 1:
        raise _wrong_axes(operation, name, t, axes)
    if not t.is_floating_point():
        raise _wrong_dtype(operation, name, t, "floating point")


def check_operand(
    operation: str, name: str, t: Tensor, shape: Shape, like: Tensor, *, same_dtype: bool = True
) -> None:
    """Refuse a tensor of another shape, or of another device or dtype than `like`.

    Without `same_dtype`, any floating-point dtype is accepted.
    """
    is_right = t.dtype == like.dtype if same_dtype else t.is_floating_point()
    if is_right and t.shape == shape and t.device == like.device:
        return
    check_shape(operation, name, t, shape)
    check_device(operation, name, t, like)
    expected = f"{like.dtype} as the other operands have" if same_dtype else "floating point"
    raise _wrong_dtype(operation, name, t, expected)


def check_weight(operation: str, name: str, weight: Shaped, axes: str, like: Tensor) -> None:
    """Refuse a weight with other axes, on another device or, if it is a tensor, another dtype.

    Of float32 and bfloat16 each is right beside the other, too.
    """
    if isinstance(weight, Tensor):
        check_axes(operation, name, weight, axes)
        either = {weight.dtype, like.dtype} <= {torch.bfloat16, torch.float32}
        check_operand(operation, name, weight, weight.shape, like, same_dtype=not either)
        return
    if len(weight.shape) != axes.count(" ") + 1:
        raise _wrong_axes(operation, name, weight, axes)
    check_device(operation, name, weight, like)


def check_shape(operation: str, name: str, t: Shaped, shape: Shape) -> None:
    """Refuse another shape."""
    if t.shape != shape:
        raise OperandError(
            f"{operation}: {name} has shape {list(t.shape)}; expected {list(shape)}, which the "
            "other operands imply"
        )


def check_device(operation: str, name: str, t: Shaped, like: Tensor) -> None:
    """Refuse another device than that of `like`."""
    if t.device != like.device:
        raise OperandError(
            f"{operation}: {name} is on {t.device}; expected {like.device} as the other operands"
        )


def check_pool(operation: str, name: str, t: Tensor) -> None:
    """Refuse a pool, which is written in place, that is not contiguous."""
    if not t.is_contiguous():
        raise OperandError(
            f"{operation}: {name} has shape {list(t.shape)} and strides {list(t.stride())}; it is "
            "written in place and has to be contiguous"
        )


def check_intermediate_states(operation: str, t: Tensor, shape: Shape, pool: Tensor) -> None:
    """Refuse intermediate states unlike their pool, or whose rows are not contiguous."""
    check_operand(operation, "intermediate_states", t, shape, pool)
    if t.is_contiguous():
        return
    step = math.prod(shape[2:])
    if t.stride()[1:] == (step, *pool.stride()[1:]) and t.stride(0) >= step * shape[1]:
        return
    if not shape[0] or (t.stride(0) >= t[0].numel() and t[0].is_contiguous()):
        return
    raise OperandError(
        f"{operation}: intermediate_states has shape {list(t.shape)} and strides "
        f"{list(t.stride())}; what it "
        "keeps of each sequence has to be contiguous memory of its own"
    )


def check_positive(operation: str, **sizes: int) -> None:
    """Refuse sizes below one. Only the number of tokens or sequences may be zero."""
    for name, size in sizes.items():
        if size < 1:
            raise OperandError(f"{operation}: there are {size} of {name}; expected one at least")


def check_divides(operation: str, name: str, count: int, of: str, total: int) -> None:
    """Refuse a `count` that does not divide `total`."""
    if count < 1 or total % count:
        raise OperandError(f"{operation}: {total} of {of} are not divisible by {count} of {name}")


def check_quantizable(
    operation: str, x: Tensor, axes: Sequence[str], block: int, batch_dims: int = 0
) -> None:
    """Refuse what cannot be quantized; `block` has to divide the last axes, which have these names.

    Quantized tensors have no gradients, so an operand that requires them is refused too.
    """
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise OperandError(
            f"{operation}: x has dtype {x.dtype}; expected torch.float32 or torch.bfloat16, so "
            "convert it with x.float()"
        )
    if batch_dims < 0 or x.dim() < len(axes) + batch_dims:
        raise OperandError(
            f"{operation}: x has shape {list(x.shape)}; expected {batch_dims} batch axes before "
            f"[..., {', '.join(axes)}]"
        )
    check_positive(operation, d=x.shape[-1])
    for axis, name in enumerate(axes, start=-len(axes)):
        if x.shape[axis] % block:
            raise OperandError(
                f"{operation}: {x.shape[axis]} {name} of x are not divisible by {block}; pad them "
                "with zeros (torch.nn.functional.pad), which changes no scale, and cut the result"
            )
    check_no_gradients(operation, x)


def check_no_gradients(operation: str, *operands: Tensor | None) -> None:
    """Refuse operands that require gradients: an operation that works in place has none."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands):
        raise OperandError(
            f"{operation} has no gradients and an operand requires them; run it under "
            "torch.no_grad() or torch.inference_mode()"
        )


def check_segments(operation: str, name: str, segments: Segments, tokens: int) -> None:
    """Refuse segments that do not add up to `tokens`."""
    if segments.total != tokens:
        raise OperandError(
            f"{operation}: {name} holds {segments.total} tokens in {len(segments)} sequences; "
            f"expected {tokens}, the length of the operands"
        )


def check_sequences(operation: str, slots: Tensor, tokens: int) -> tuple[int, int]:
    """The number of sequences of a decoding step, and of tokens in each."""
    if slots.dim() != 1:
        raise OperandError(f"{operation}: slots has shape {list(slots.shape)}; expected [sequence]")
    rows = len(slots)
    if tokens % rows if rows else tokens:
        raise OperandError(
            f"{operation}: {tokens} tokens for {rows} slots; expected as many of each sequence"
        )
    return rows, tokens // rows if rows else 0


def check_indices(
    operation: str,
    name: str,
    t: Tensor,
    shape: Shape,
    like: Tensor,
    bounds: tuple[int, int],
    hint: str = "",
) -> Tensor:
    """The indices as contiguous int64. Raises OperandIndexError for one not in [low, high)."""
    integers = check_integers(operation, name, t, shape, like)
    if t.is_cpu:
        _check_range(operation, name, t, bounds, hint)
        watched = _watched.get()
        if watched is not None:
            check = partial(_check_range, operation, name, t, bounds, hint)
            watched.append(WatchedIndices(t, bounds, check))
    return integers


def check_integers(operation: str, name: str, t: Tensor, shape: Shape, like: Tensor) -> Tensor:
    """Integers of any width as contiguous int64. Their values are not checked."""
    check_shape(operation, name, t, shape)
    check_device(operation, name, t, like)
    if t.dtype != torch.int64:
        if t.dtype not in _INTEGERS:
            raise _wrong_dtype(operation, name, t, "integers, of which int64 needs no conversion")
        t = t.long()
    return t.contiguous()


def are_within(t: Tensor, bounds: tuple[int, int]) -> bool:
    """Whether all integers of a tensor on the CPU are in the range [low, high)."""
    if not t.numel():
        return True
    least, most = _extremes(t)
    return bounds[0] <= least and most < bounds[1]


def _extremes(t: Tensor) -> tuple[int, int]:
    # Neither way of reading is a PyTorch operation, so a graph that is being recorded sees neither.
    if t.numel() > _FEW:
        array = t.numpy()
        return int(array.min()), int(array.max())
    values = t.tolist() if t.dim() == 1 else list(chain.from_iterable(t.tolist()))
    return min(values), max(values)


def _check_range(operation: str, name: str, t: Tensor, bounds: tuple[int, int], hint: str) -> None:
    if not are_within(t, bounds):
        low, high = bounds
        least, most = _extremes(t)
        raise OperandIndexError(
            f"{operation}: {name} holds {least if least < low else most}; expected values from "
            f"{low} to {high - 1}{hint}"
        )


class WatchedIndices(NamedTuple):
    """An index tensor whose values may change between replays, and the check of its values."""

    indices: Tensor
    bounds: tuple[int, int]
    check: Callable[[], None]

    def check_again(self) -> None:
        """Check the current values; the few indices of a decoding step get a faster check first."""
        if self.indices.dim() != 1 or not 0 < self.indices.numel() <= _FEW:
            self.check()
            return
        values: list[int] = self.indices.tolist()
        if min(values) < self.bounds[0] or max(values) >= self.bounds[1]:
            self.check()


_watched: ContextVar[list[WatchedIndices] | None] = ContextVar("watched", default=None)


@contextmanager
def watching_indices(watched: list[WatchedIndices]) -> Iterator[None]:
    """Append every index tensor that is checked inside the `with` block to `watched`."""
    token = _watched.set(watched)
    try:
        yield
    finally:
        _watched.reset(token)


def without_tokens(x: Tensor, *operands: Tensor | None) -> Tensor:
    """An empty `x`, as the result of an operation whose operands all get gradients of zero."""
    for t in operands:
        if t is not None:
            x = x * t.flatten()[:0].sum().to(x.dtype)
    return x


def _wrong_axes(operation: str, name: str, t: Shaped, axes: str) -> OperandError:
    return OperandError(
        f"{operation}: {name} has shape {list(t.shape)}; expected [{axes.replace(' ', ', ')}]"
    )


def _wrong_dtype(operation: str, name: str, t: Tensor, expected: str) -> OperandError:
    return OperandError(f"{operation}: {name} has dtype {t.dtype}; expected {expected}")
