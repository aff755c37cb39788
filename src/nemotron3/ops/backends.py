"""The choice of an operation's implementation, made in one place and logged.

Every operation offers `reference` (the executable specification) and `torch` (vectorised, any
device); some offer `native` (C++ for float32 and bfloat16 on the CPU, see ops/native) and `triton`
(kernels for CUDA devices). A caller passes `backend="auto"` and gets the best one for the device
and dtype of its tensors; asking by name for one that is not available is an error, never a silent
substitute.

Triton is imported when a kernel is first used, since most machines do not need it. With
TRITON_INTERPRET=1 its kernels run on CPU tensors if `backend="triton"` asks for them: slowly, for
tests.
"""

import functools
import importlib
import importlib.util
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nemotron3.errors import BackendUnavailableError
from nemotron3.ops import native

Backend = Literal["auto", "reference", "torch", "native", "triton"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernel:
    """An implementation that is imported when it is first used."""

    module: str
    function: str
    dtypes: native.Dtypes = native.FLOAT32
    """Of the operands that a compiled function takes."""

    @functools.cached_property
    def loaded(self) -> Callable[..., Any]:
        """The function, imported on first use."""
        return getattr(importlib.import_module(self.module), self.function)


Implementations = Mapping[str, Callable[..., Any] | Kernel]


def resolve(
    operation: str, backend: str, implementations: Implementations, *operands: Tensor | None
) -> Callable[..., Any]:
    """The implementation of `operation` to run on these operands, which are on one device.

    `operands` must contain every tensor whose dtype matters: compiled functions read each in one of
    the dtypes that they declare. Raises BackendUnavailableError where `backend` names one that
    cannot run here.
    """
    return load(implementations, choose(operation, backend, implementations, *operands))


def choose(
    operation: str, backend: str, implementations: Implementations, *operands: Tensor | None
) -> str:
    """The name of the implementation that `resolve` gives."""
    name = _fastest(implementations, operands) if backend == "auto" else backend
    if name not in implementations:
        raise BackendUnavailableError(
            f"operation {operation!r} has no backend {backend!r}; choose from "
            f"auto, {', '.join(implementations)}"
        )
    if backend == "triton":
        _require_triton(operation, operands)
    elif backend == "native":
        _require_native(operation, implementations[name], operands)
    if name == "native" and any(t is not None and t.dtype == torch.bfloat16 for t in operands):
        _tell_of_missing_instructions()
    _log_choice(operation, name)
    if _thread.choices is not None:
        _thread.choices[operation] = name
    return name


def load(implementations: Implementations, name: str) -> Callable[..., Any]:
    """The implementation of that name, imported on first use."""
    chosen = implementations[name]
    return chosen.loaded if isinstance(chosen, Kernel) else chosen


class _Thread(threading.local):
    """State of the calling thread: a run must not record the choices of another thread's run."""

    choices: dict[str, str] | None = None


_thread = _Thread()


@contextmanager
def recorded_backends() -> Iterator[dict[str, str]]:
    """Record which backend each operation uses inside the `with` block, in the calling thread.

    The dictionary maps operations to backends and is part of the record of a run. An operation that
    used several backends has the last. Recordings nest: the outer one gets these choices too.
    """
    outer, choices = _thread.choices, {}
    _thread.choices = choices
    try:
        yield choices
    finally:
        _thread.choices = outer
        if outer is not None:
            outer.update(choices)


@functools.cache
def _tell_of_missing_instructions() -> None:
    """Log once what bfloat16 costs on a processor that does not multiply it."""
    if not native.multiplies_bfloat16():
        _log.warning(
            "this processor has no instructions for bfloat16 (AVX512_BF16), so its products are "
            "computed in float32; activations in float32 are faster here"
        )


@functools.cache
def _log_choice(operation: str, name: str) -> None:
    """Log a choice. It is made at every call and logged once per process."""
    _log.info("%s runs on the %s backend", operation, name)


def least_slot(name: str) -> int:
    """The smallest valid slot: -1 is padding for the GPU kernels, and an error elsewhere."""
    return -1 if name == "triton" else 0


def has_capability(device: torch.device, least: tuple[int, int]) -> bool:
    """Whether a device is a GPU of this compute capability or a later one."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= least


def _fastest(implementations: Implementations, operands: Sequence[Tensor | None]) -> str:
    compiled = implementations.get("native")
    if compiled and _first_unsupported(compiled, operands) is None and native.available():
        return "native"
    first = operands[0]
    assert first is not None, "the first operand is never optional"
    if "triton" in implementations and first.device.type == "cuda" and _has_triton():
        return "triton"
    return "torch"


def _first_unsupported(
    compiled: Callable[..., Any] | Kernel, operands: Sequence[Tensor | None]
) -> Tensor | None:
    """The first operand that a compiled function cannot read."""
    dtypes = _dtypes(compiled)
    for operand in operands:
        if operand is not None and not native.supports(operand, dtypes):
            return operand
    return None


def _dtypes(compiled: Callable[..., Any] | Kernel) -> native.Dtypes:
    return compiled.dtypes if isinstance(compiled, Kernel) else native.FLOAT32


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _require_triton(operation: str, operands: Sequence[Tensor | None]) -> None:
    if not _has_triton():
        raise BackendUnavailableError(
            f"the triton backend of {operation!r} needs the package triton: "
            "pip install 'nemotron3[gpu]'"
        )
    like = operands[0]
    assert like is not None, "the first operand is never optional"
    if like.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise BackendUnavailableError(
            f"the triton backend of {operation!r} needs tensors on a CUDA device, not "
            f"{like.device}; use backend='auto', or set TRITON_INTERPRET=1 to run its kernels "
            "slowly on a CPU"
        )


def _require_native(
    operation: str, compiled: Callable[..., Any] | Kernel, operands: Sequence[Tensor | None]
) -> None:
    like = _first_unsupported(compiled, operands)
    if like is not None:
        names = " and ".join(map(native.name_of, _dtypes(compiled)))
        raise BackendUnavailableError(
            f"the native backend of {operation!r} takes {names} on the CPU, and was given "
            f"{like.dtype} on {like.device}; use backend='auto'"
        )
    if not native.available():
        raise BackendUnavailableError(
            f"the native backend of {operation!r} needs Linux and a C++ compiler (CXX, c++, g++ or "
            "clang++), and NEMOTRON3_NATIVE not set to 0; use backend='auto'"
        )
