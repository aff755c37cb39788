"""Which implementation of an operation runs, decided once and said aloud.

Every operation offers `reference` (the executable specification) and `torch` (vectorised, any
device). A caller passes `backend="auto"` and gets the best one there is; asking by name for one
that is not there is an error, never a silent substitute.
"""

import logging
from collections.abc import Mapping
from typing import Literal, TypeVar

from nemotron3.errors import BackendUnavailableError

Backend = Literal["auto", "reference", "torch"]
Implementation = TypeVar("Implementation")

_log = logging.getLogger(__name__)
_chosen: dict[str, str] = {}


def resolve(
    operation: str, backend: str, implementations: Mapping[str, Implementation]
) -> Implementation:
    """The implementation of `operation` to run; `auto` takes the last one listed, the fastest."""
    name = list(implementations)[-1] if backend == "auto" else backend
    if name not in implementations:
        raise BackendUnavailableError(
            f"operation {operation!r} has no backend {backend!r}; choose from "
            f"auto, {', '.join(implementations)}"
        )
    if _chosen.get(operation) != name:
        _chosen[operation] = name
        _log.info("%s runs on the %s backend", operation, name)
    return implementations[name]


def chosen_backends() -> dict[str, str]:
    """The backend that each operation used last, for the record of a run."""
    return dict(_chosen)
