"""Which implementation of an operation runs, decided once and said aloud.

Every operation offers `reference` (the executable specification) and `torch` (vectorised, any
device); some offer `triton` (kernels for CUDA devices). A caller passes `backend="auto"` and gets
the best one for the device that its tensors are on; asking by name for one that is not there is an
error, never a silent substitute.

Triton is imported when a kernel is first wanted, since most machines do without. With
TRITON_INTERPRET=1 its kernels run on CPU tensors when asked for by name: slowly, for tests.
"""

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from nemotron3.errors import BackendUnavailableError

Backend = Literal["auto", "reference", "torch", "triton"]

_log = logging.getLogger(__name__)
_chosen: dict[str, str] = {}


@dataclass(frozen=True)
class Kernel:
    """An implementation that is imported when it is first wanted."""

    module: str
    function: str

    def load(self) -> Callable[..., Any]:
        """Import it."""
        return getattr(importlib.import_module(self.module), self.function)


Implementations = Mapping[str, Callable[..., Any] | Kernel]


def resolve(
    operation: str, backend: str, implementations: Implementations, device: torch.device
) -> Callable[..., Any]:
    """The implementation of `operation` to run on `device`."""
    name = _fastest(implementations, device) if backend == "auto" else backend
    if name not in implementations:
        raise BackendUnavailableError(
            f"operation {operation!r} has no backend {backend!r}; choose from "
            f"auto, {', '.join(implementations)}"
        )
    if name == "triton":
        _require_triton(operation, device)
    if _chosen.get(operation) != name:
        _chosen[operation] = name
        _log.info("%s runs on the %s backend", operation, name)
    chosen = implementations[name]
    return chosen.load() if isinstance(chosen, Kernel) else chosen


def chosen_backends() -> dict[str, str]:
    """The backend that each operation used last, for the record of a run."""
    return dict(_chosen)


def _fastest(implementations: Implementations, device: torch.device) -> str:
    if "triton" in implementations and device.type == "cuda" and _has_triton():
        return "triton"
    return "torch"


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _require_triton(operation: str, device: torch.device) -> None:
    if not _has_triton():
        raise BackendUnavailableError(
            f"the triton backend of {operation!r} needs the package triton: "
            "pip install 'nemotron3[gpu]'"
        )
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise BackendUnavailableError(
            f"the triton backend of {operation!r} needs tensors on a CUDA device, not {device}; "
            "use backend='auto', or set TRITON_INTERPRET=1 to run its kernels slowly on a CPU"
        )
