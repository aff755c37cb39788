r"""Parse the text of an argument as a JSON value of a given type.

Python's spellings (`True`, `None`, `{'a': 1}`) are accepted besides JSON's, because the template
itself writes earlier calls that way. Valid JSON keeps its digits and its white space: `1e400` is a
number in JSON but not a finite float in Python.
"""

import ast
import json
import math
import re
import warnings
from typing import Any, NoReturn

UNREAD: Any = object()
"""Returned where the text cannot be read as the type."""

_INTEGER = re.compile(r"[-+]?\d+(\.0+)?\Z", re.ASCII)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_MAX_DEPTH = 200
"""Most nested lists and objects: the programs that receive the arguments have limits, too."""


def read_as(kind: str, text: str) -> tuple[Any, str | None]:
    """The value of the type `kind`, or UNREAD; and the text itself if it is valid JSON."""
    if kind == "null":
        return (None if text in ("null", "None") else UNREAD), None
    if kind == "boolean":
        return {"true": True, "false": False}.get(text.lower(), UNREAD), None
    if kind == "integer":
        return _integer(text), None
    if kind == "number":
        return _number(text), None
    if text[:1] != ("[" if kind == "array" else "{"):
        return UNREAD, None
    value, written = load_json(text)
    if value is UNREAD:
        value = _load_python(text)
    fits = isinstance(value, list) if kind == "array" else isinstance(value, dict)
    return (value, written) if fits else (UNREAD, None)


def load_json(text: str) -> tuple[Any, str | None]:
    """The value of a JSON text, and the text; UNREAD and None if it is invalid or too deep."""
    if not _is_flat(text):
        return UNREAD, None
    try:
        return json.loads(text, parse_constant=_refuse), text
    except (ValueError, RecursionError):
        return UNREAD, None


def _integer(text: str) -> Any:
    try:
        return int(text.partition(".")[0]) if _INTEGER.match(text) else UNREAD
    except ValueError:  # more digits than Python converts
        return UNREAD


def _number(text: str) -> Any:
    whole = _integer(text)
    if whole is not UNREAD and "." not in text:
        return whole
    try:
        value = float(text)
    except ValueError:
        return UNREAD
    return value if math.isfinite(value) and text.isascii() and "_" not in text else UNREAD


def _load_python(text: str) -> Any:
    if not _is_flat(text):
        return UNREAD
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in a model's text
            value = ast.literal_eval(text)
        json.dumps(value, allow_nan=False)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return UNREAD
    return value


def _is_flat(text: str) -> bool:
    """Whether the lists and objects in a text are nested at most `_MAX_DEPTH` deep."""
    if text.count("[") + text.count("{") <= _MAX_DEPTH:
        return True
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", _STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > _MAX_DEPTH:
            return False
    return True


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
