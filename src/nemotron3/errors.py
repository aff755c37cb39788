"""The named errors of the package.

Each is also the standard error that a reader would expect, so `except ValueError` keeps working.
They are raised at borders (command line, files, configuration) and their message has three parts:
the thing, the value that was found, and the remedy. Which value it was is data as well (`field`),
for callers that tell it on by another name. Inside the package `assert` states invariants.
"""


class Nemotron3Error(Exception):
    """The parent of every error raised on purpose, for callers who want to catch them all."""


class ConfigError(Nemotron3Error, ValueError):
    """A configuration that cannot be built: unknown preset, impossible pattern, uneven sizes."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        """`field` is the dotted name of the value that is wrong, where it is a single one."""
        super().__init__(message)
        self.field = field


class CheckpointError(Nemotron3Error, RuntimeError):
    """A checkpoint that cannot be read: a tensor missing, extra, truncated or mis-shaped."""


class StorageError(Nemotron3Error, OSError):
    """Bytes that could not be written: a full disk, a folder that may not be written to."""


class DataError(Nemotron3Error, ValueError):
    """Text or tokens that cannot be used: not UTF-8, no documents, a wrong column, a bad index."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        """`field` is the name of the part of a request that is wrong, where it is a single one."""
        super().__init__(message)
        self.field = field


class BackendUnavailableError(Nemotron3Error, RuntimeError):
    """A device or kernel that was asked for by name and is not there."""


class DependencyMissingError(Nemotron3Error, ImportError):
    """An optional package that the requested feature needs; the message holds the install line."""


class DivergenceError(Nemotron3Error, ArithmeticError):
    """A training run whose loss or gradient is no longer a number."""


class OverloadedError(Nemotron3Error, RuntimeError):
    """More requests than may wait; the same request can be tried again later."""
