"""An environment that raises: a failure of the rollout, with what its author needs to mend it.

An environment is code of many authors that is called thousands of times, with whatever a policy
writes. One error in a rare case must not end a run of hours, which would meet it again when it is
resumed: tasks follow from the seed. So an exception is a failure like that of a judge. Its message
names the environment, the method, the exception, and the line of the author's file.

Errors that say what the machine or the installation lacks (`BackendUnavailableError`,
`DependencyMissingError`) are raised on: trying again does not help. So is what is no `Exception`,
such as an interrupt.
"""

import logging
import sysconfig
import traceback
from pathlib import Path
from typing import Any

from nemotron3.environments.verification import Failure, FailureKind, RolloutFailedError
from nemotron3.errors import BackendUnavailableError, DependencyMissingError

_MOST_CHARACTERS = 300
"""Of an exception's own text; some hold a whole answer."""
_log = logging.getLogger(__name__)
_KINDS = {
    "verify": FailureKind.JUDGE,
    "verify_group": FailureKind.JUDGE,
    "call_tool": FailureKind.TOOL,
}
_PACKAGE = Path(__file__).parents[1]
_LIBRARIES = tuple(
    Path(path) for name, path in sysconfig.get_paths().items() if name in ("stdlib", "purelib")
)


def failure_of_error(error: Exception, environment: Any, method: str) -> Failure:
    """The failure that an exception of an environment's method is.

    Raises the exception itself where it says that the machine lacks something.
    """
    if isinstance(error, RolloutFailedError):
        return error.failure
    if isinstance(error, BackendUnavailableError | DependencyMissingError):
        raise error
    place = _place(error, environment, method)
    text = str(error)[:_MOST_CHARACTERS]
    said = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return Failure(
        kind=_KINDS.get(method, FailureKind.ENVIRONMENT),
        message=f"environment {environment.name}: {method} raised {said} ({place})",
        raised_at=place,
        traceback="".join(traceback.format_exception(error)),
    )


class ErrorLog:
    """Logs what environments raised, with the traceback, once for each line of theirs."""

    def __init__(self) -> None:
        self._logged: set[tuple[str, str]] = set()

    def log(self, environment: str, failure: Failure | None) -> None:
        """Only what an exception is the reason of."""
        if failure is None or failure.raised_at is None:
            return
        place = (environment, failure.raised_at)
        if place not in self._logged:
            self._logged.add(place)
            _log.error("%s\n%s", failure.message, failure.traceback)


def _place(error: Exception, environment: Any, method: str) -> str:
    """`file:line` of the innermost code that is neither ours nor a library's, if there is any."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not _is_library(frame.filename)]
    if own:
        return f"{own[-1].filename}:{own[-1].lineno}"
    code = getattr(getattr(type(environment), method, None), "__code__", None)
    if code is not None and not _is_library(code.co_filename):  # it returned something wrong
        return f"{code.co_filename}:{code.co_firstlineno}"
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown line"


def _is_library(filename: str) -> bool:
    path = Path(filename)
    return filename.startswith("<") or any(
        path.is_relative_to(folder) for folder in (_PACKAGE, *_LIBRARIES)
    )
