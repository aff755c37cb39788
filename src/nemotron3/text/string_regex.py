r"""Regular expressions for JSON schema's constraints on strings, for text without quotes.

In a call a string is written without quotes and escapes, so llguidance's own expressions for
`pattern` and `format`, which match JSON strings, cannot be used. These are in the syntax of Rust's
`regex`, which the grammars use: no look-around, no anchors.
"""

import re
from collections.abc import Iterable, Mapping

from nemotron3.errors import DataError
from nemotron3.text.messages import Json

_YEAR = r"[1-9][0-9]{3}"
_LEAP = r"[1-9][0-9](?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00"
_DATE = (
    rf"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    rf"|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))|(?:{_LEAP})-02-29)"
)
_CLOCK = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?"
_OFFSET = r"(?:Z|[-+](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = rf"{_BYTE}(?:\.{_BYTE}){{3}}"
_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_HOST = rf"{_LABEL}(?:\.{_LABEL}){{0,8}}"
_GROUP = r"[0-9a-fA-F]{1,4}"
_IPV6 = "|".join(
    [rf"(?:{_GROUP}:){{7}}{_GROUP}"]
    + [rf"(?:{_GROUP}(?::{_GROUP}){{0,{6 - n}}})?::(?:{_GROUP}(?::{_GROUP}){{0,{n - 1}}})?"
       for n in range(1, 7)]
)  # fmt: skip
_CLOCK_SPAN = r"[0-9]{1,9}H(?:[0-9]{1,9}M(?:[0-9]{1,9}S)?)?|[0-9]{1,9}M(?:[0-9]{1,9}S)?|[0-9]{1,9}S"
_DATE_SPAN = r"[0-9]{1,9}Y(?:[0-9]{1,9}M(?:[0-9]{1,9}D)?)?|[0-9]{1,9}M(?:[0-9]{1,9}D)?|[0-9]{1,9}D"
_DURATION = rf"P(?:[0-9]{{1,9}}W|(?:{_DATE_SPAN})(?:T(?:{_CLOCK_SPAN}))?|T(?:{_CLOCK_SPAN}))"
_URI = (
    r"[a-zA-Z][a-zA-Z0-9+.-]*:(?:[a-zA-Z0-9\x2d._~:\x2f?@!$&'()*+,;=]|%[0-9a-fA-F]{2})+"
    r"(?:#(?:[a-zA-Z0-9\x2d._~:\x2f?@!$&'()*+,;=]|%[0-9a-fA-F]{2})*)?"
)

FORMATS: Mapping[str, str] = {
    "date": _DATE,
    "time": _CLOCK + _OFFSET,
    "date-time": f"{_DATE}T{_CLOCK}{_OFFSET}",
    "duration": _DURATION,
    "email": rf"[a-zA-Z0-9_+-]+(?:\.[a-zA-Z0-9_+-]+)*@(?:{_LABEL}\.){{1,8}}[a-zA-Z]{{2,63}}",
    "hostname": _HOST,
    "ipv4": _IPV4,
    "ipv6": _IPV6,
    "uuid": "[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}",
    "uri": _URI,
}
"""The supported formats; times follow RFC 3339, and dates are limited to days that exist."""

_CLASSES = {"d": "0-9", "w": "A-Za-z0-9_"}  # ECMA's are ASCII
_LOOKS_AROUND = re.compile(r"\(\?<?[=!]")


def string_pattern(schema: Mapping[str, Json]) -> str | None:
    """The `pattern` that a string must match, or None.

    zod writes a pattern with look-around with an equivalent `format`; then only the format, which
    is stricter, is used.
    """
    pattern = schema.get("pattern")
    if not isinstance(pattern, str):
        return None
    is_spare = schema.get("format") in FORMATS and _LOOKS_AROUND.search(pattern) is not None
    return None if is_spare else pattern


def string_regexes(schema: Mapping[str, Json]) -> list[str]:
    """The expressions that a text must match, all of them and as a whole, to fit a plain schema."""
    found: list[str] = []
    least, most = _length(schema.get("minLength")), _length(schema.get("maxLength"))
    if least is not None or most is not None:
        found.append(f"(?s:.{{{least or 0},{'' if most is None else most}}})")
    pattern, form = string_pattern(schema), format_regex(schema)
    if pattern is not None:
        found.append(_searched(pattern))
    return found if form is None else [*found, form]


def format_regex(schema: Mapping[str, Json]) -> str | None:
    """The expression of a `format`; None for an unknown format, which constrains nothing."""
    form = schema.get("format")
    if not isinstance(form, str) or form not in FORMATS:
        return None
    # With a pattern, which may ask for a local time, the UTC offset is optional.
    is_bare = form in ("time", "date-time") and string_pattern(schema) is not None
    return FORMATS[form] + "?" * is_bare


def fits_string(text: str, schema: Mapping[str, Json]) -> bool:
    """Whether a text has the length and the pattern of a plain schema."""
    least, most = _length(schema.get("minLength")), _length(schema.get("maxLength"))
    if len(text) < (least or 0) or (most is not None and len(text) > most):
        return False
    pattern = schema.get("pattern")
    try:
        return not isinstance(pattern, str) or re.search(pattern, text) is not None
    except re.error:
        return True  # a pattern that Python's dialect cannot compile


def without(words: Iterable[str]) -> str:
    """An expression for texts that contain none of the words.

    Each word begins with `<` and contains no other `<`. So the expression is small and needs no
    complement, which together with bounded lengths would exceed the automaton's limits.
    """
    rests = sorted({word[1:] for word in words})
    assert all(word.startswith("<") and "<" not in word[1:] for word in words)
    return f"[^<]*(?:<{_tail(rests)})*"


def quoted(text: str) -> str:
    """An expression that matches exactly this text."""
    return "".join(c if c.isascii() and c.isalnum() else rf"\x{{{ord(c):x}}}" for c in text)


def _tail(words: list[str]) -> str:
    """An expression for texts without `<` that begin with none of the words; they may end early."""
    heads = sorted({word[0] for word in words})
    branches = [f"[^<{''.join(map(quoted, heads))}][^<]*"]
    for head in heads:
        rests = [word[1:] for word in words if word[0] == head]
        if "" not in rests:
            branches.append(quoted(head) + _tail(rests))
    return f"(?:{'|'.join(branches)})?"


def _length(value: Json) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value % 1:
        raise DataError(f"minLength or maxLength is {value!r}; give a number of characters")
    return int(value)


def _searched(pattern: str) -> str:
    """Convert an ECMA `pattern`, which may match anywhere, to one that matches the whole text."""
    if _LOOKS_AROUND.search(pattern) is not None:
        raise DataError(f"pattern is {pattern!r}; look-around cannot be enforced")
    found: list[str] = []
    for starts, inner, ends in _branches(pattern):
        found.append(f"{'' if starts else '(?s:.*)'}(?:{inner}){'' if ends else '(?s:.*)'}")
    return "|".join(found)


def _branches(pattern: str) -> list[tuple[bool, str, bool]]:
    """Each branch in Rust's syntax, between flags: whether it is anchored at its start, its end."""
    found: list[tuple[bool, str, bool]] = []
    part, starts, ends, depth, is_class = "", False, False, 0, False
    for token in re.findall(r"\\u[0-9a-fA-F]{4}|\\.|.", pattern, re.DOTALL):
        if ends and not (token == "|" and depth == 0):
            raise _no_anchor(pattern)
        if token == "|" and depth == 0 and not is_class:
            found.append((starts, part, ends))
            part, starts, ends = "", False, False
        elif token in ("^", "$") and not is_class:
            if depth or (token == "^" and (part or starts)):
                raise _no_anchor(pattern)
            starts, ends = starts or token == "^", token == "$"
        else:
            part += _translated(token, is_class=is_class)
            if not is_class:
                depth += (token == "(") - (token == ")")
            is_class = token != "]" if is_class else token == "["
    return [*found, (starts, part, ends)]


def _translated(token: str, *, is_class: bool) -> str:
    if token[0] != "\\":
        # Rust allows nested classes, and in the grammar's text a slash ends an expression.
        return {"/": r"\x{2f}", "\n": r"\n", "[": r"\[" if is_class else "["}.get(token, token)
    if token[1:] in _CLASSES:
        return _CLASSES[token[1:]] if is_class else f"[{_CLASSES[token[1:]]}]"
    if token[1] == "u" and len(token) == 6:
        return rf"\x{{{token[2:]}}}"
    return r"\x{2f}" if token[1:] == "/" else token


def _no_anchor(pattern: str) -> DataError:
    return DataError(
        f"pattern is {pattern!r}; '^' and '$' are supported only at the ends of an expression and "
        f"of its branches"
    )
