"""The named errors of the package.

Each is also the standard error that a caller would expect, so `except ValueError` works. They are
raised at entry points (command line, files, configuration, HTTP), and a message has three parts:
the thing, the value found, and the remedy. Inside the package `assert` states invariants.
"""

from collections.abc import Mapping
from typing import Self


class Nemotron3Error(Exception):
    """The base class of all errors that the package raises on purpose."""


class InvalidValueError(Nemotron3Error, ValueError):
    """A value that cannot be used; the base class of errors that carry the value's name as data.

    The message is composed of `field` and `problem`: of "top_p" and "is 2; it must be at most 1".
    A caller for which the field has another name, such as the server for its clients, re-raises the
    error under that name (`renamed`, `under`) with a new message.
    """

    def __init__(self, problem: str, *, field: str | None = None, other: str | None = None) -> None:
        """`problem` continues the sentence that `field` begins; without a field it is a sentence.

        `field` is the dotted name of the value, such as `messages[0].role`, or None if no single
        value is wrong. A problem that begins with a colon follows the name without a space. `other`
        is the name of a second field, for which `{other}` stands in `problem`.
        """
        message = problem if other is None else problem.replace("{other}", other)
        if field is not None:
            message = f"{field}{'' if message.startswith(':') else ' '}{message}"
        super().__init__(message)
        self.problem = problem
        self.field = field
        self.other = other

    def renamed(self, names: Mapping[str, str]) -> Self:
        """The same error with other names for its fields; those not in `names` stay."""
        field, other = (
            None if name is None else names.get(name, name) for name in (self.field, self.other)
        )
        return type(self)(self.problem, field=field, other=other)

    def under(self, path: str) -> Self:
        """The same error for a value at `path` in a larger structure."""
        if self.field is None:
            return type(self)(f": {self.problem}", field=path, other=self.other)
        other = None if self.other is None else f"{path}.{self.other}"
        return type(self)(self.problem, field=f"{path}.{self.field}", other=other)


class ConfigError(InvalidValueError):
    """A configuration that cannot be built: unknown preset, impossible pattern, uneven sizes."""


class DataError(InvalidValueError):
    """Text or tokens that cannot be used: not UTF-8, no documents, a wrong column, a bad index."""


class CheckpointError(Nemotron3Error, RuntimeError):
    """A checkpoint that cannot be read: a tensor missing, extra, truncated or mis-shaped."""


class StorageError(Nemotron3Error, OSError):
    """Bytes that could not be written: a full disk, a folder that may not be written to."""


class BackendUnavailableError(Nemotron3Error, RuntimeError):
    """A device or kernel that was requested by name and is not available."""


class OperandError(Nemotron3Error, RuntimeError):
    """An operand of the wrong dtype, shape, device or layout; PyTorch raises RuntimeError here."""


class OperandIndexError(Nemotron3Error, IndexError):
    """An index out of range: of an expert, a token, a slot, a page."""


class DependencyMissingError(Nemotron3Error, ImportError):
    """An optional package that a feature needs is missing; the message has the install command."""


class DivergenceError(Nemotron3Error, ArithmeticError):
    """A training run whose loss or gradient is not finite."""


class OverloadedError(Nemotron3Error, RuntimeError):
    """Too many requests are waiting; the same request can be sent again later."""
