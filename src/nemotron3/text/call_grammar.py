r"""A Lark grammar of tool calls, for llguidance: it constrains the output where a call is required.

Every value is written in a form that its `ParameterType` reads. Arguments come in the order of the
schema: the required ones always, and only declared ones; a function that declares none accepts any.
A text cannot contain `</parameter>` or the opening tag of a parameter of its function, since the
format has no escapes. Bounded numbers, lists and objects use a grammar of JSON; a text that is
allowed as an alternative must not begin like them.

Except for JSON, a value and the `</parameter>` after it are one terminal, because the lexer is
greedy and does not backtrack.

The template writes a line end after a call. The grammar allows it at the end of the output:
otherwise a model that has learned it would have to continue with another call.
"""

import json
from collections.abc import Iterable, Mapping

from nemotron3.errors import DataError
from nemotron3.text.messages import Json, Tool
from nemotron3.text.parameter_types import LOOKS, ParameterType, same
from nemotron3.text.schemas import Conjunction, closed
from nemotron3.text.string_regex import string_regexes, without
from nemotron3.text.tool_listing import write_argument
from nemotron3.text.tool_parameters import (
    ArgumentSet,
    argument_sets,
    argument_types,
    check_enforceable,
    place_of,
)

_CLOSE = "</parameter>"
_END = f"\n{_CLOSE}\n"
_JSON_OPTIONS = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,40}", "lenient": False}
_MAX_NAME = 64
"""Characters of a name that texts may not contain; more would nest an expression too deeply."""

_INTEGER = r"-?(?:0|[1-9][0-9]{0,17})"
_SCALARS = {
    "null": "null|None",
    "boolean": "true|false|True|False",
    "integer": _INTEGER,
    # At most as large as a float64: a larger one is not a number in most languages.
    "number": rf"{_INTEGER}(?:\.[0-9]{{1,25}})?(?:[eE][-+]?(?:[0-9]{{1,2}}|[12][0-8][0-9]))?",
}
_NUMBERS = frozenset({"integer", "number"})
_CONTAINERS = frozenset({"array", "object"})
_BOUNDS = frozenset(
    {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "$ref"}
    | {"not", "if", "then", "else"}
)
_UNENFORCEABLE = frozenset({"$ref", "$dynamicRef", "$recursiveRef", "not", "if", "then", "else"})


def call_grammar(tools: Iterable[Tool], *, is_single: bool) -> str:
    """The grammar of one call, or of several, of these tools.

    Raises `DataError` for a schema that a grammar cannot enforce.
    """
    rules: list[str] = []
    calls: list[str] = []
    for i, tool in enumerate(tools):
        calls.append(f"call_{i}")
        try:
            rules += _call_rules(f"call_{i}", tool)
        except DataError as error:
            place = "parameters" if error.field is None else error.field
            raise DataError(
                f": no call of {tool.name!r} can be required; {error.problem.removeprefix(': ')}",
                field=f"{tool.source}.{place}",
            ) from error
    repeated = "call" if is_single else 'call ("\\n" call)*'
    lines = [
        f'start: {repeated} "\\n"?',
        'call: <tool_call> "\\n" function "\\n" </tool_call>',
        f"function: {' | '.join(calls)}",
        *rules,
    ]
    return "\n".join(lines) + "\n"


def _call_rules(rule: str, tool: Tool) -> list[str]:
    parameters = tool.parameters or {}
    check_enforceable(parameters)
    sets = argument_sets(parameters)
    if not sets:
        raise DataError("no arguments fit its parameters")
    values = _Values(rule, parameters, {name for each in sets for name in each.names})
    head = json.dumps(f"<function={tool.name}>\n")
    wholes: list[str] = []
    rules: list[str] = []
    for i, each in enumerate(sets):
        parts, of_parts = _parts(f"{rule}_{i}", each, values)
        rules += of_parts
        wholes.append(" ".join([head, *parts, '"</function>"']))
    return [f"{rule}: {' | '.join(wholes)}", *rules, *values.rules]


def _parts(rule: str, each: ArgumentSet, values: "_Values") -> tuple[list[str], list[str]]:
    """The grammar symbols of a set's arguments, in order, and their rules."""
    if each.takes_any:
        value = values.of(each.undescribed_type(values.root))
        name = r'"<parameter=" /[^<>\n]{1,256}/ ">\n"'
        return [f"{rule}_any*"], [f"{rule}_any: {name} {value}"]
    parts: list[str] = []
    rules: list[str] = []
    for i, (name, is_required, allowed) in enumerate(argument_types(each, values.root)):
        parts.append(f"{rule}_{i}" + ("" if is_required else "?"))
        try:
            value = values.of(allowed)
        except DataError as error:
            raise DataError(
                f": parameter {name!r}: {error.problem}", field=place_of(name, values.root)
            ) from error
        rules.append(f"{rule}_{i}: {json.dumps(_head(name))} {value}")
    return parts, rules


class _Values:
    """Grammar expressions for values, including the closing tag, and the rules that they need."""

    def __init__(self, rule: str, root: Mapping[str, Json], names: Iterable[str]) -> None:
        self.root = root
        self.rules: list[str] = []
        self._rule = rule
        self._named: dict[str, str] = {}  # rule names by right-hand side
        self._words = [_CLOSE, *map(_opening, names)]
        self._safe = self._terminal(f"/{without(self._words)}/")

    def of(self, allowed: ParameterType) -> str:
        """The expression of a value."""
        json_kinds = _CONTAINERS | _NUMBERS if _is_bounded(allowed) else _CONTAINERS
        choices = [json.dumps(text + _END) for text in self._literals(allowed)]
        regexes = self._scalars(allowed, json_kinds) + self._texts(allowed, json_kinds)
        if regexes:
            choices.append(f"({' | '.join(regexes)}) {json.dumps(_END)}")
        expressions = [self._terminal(" | ".join(choices))] if choices else []
        schemas = _schemas(allowed, json_kinds)
        if schemas:
            whole = {**closed(schemas, self.root), "x-guidance": _JSON_OPTIONS}
            expressions.append(
                f"{self._named_rule(f'%json {json.dumps(whole)}')} {json.dumps(_END)}"
            )
        if not expressions:
            raise DataError("no value that fits its schema can be written in a call")
        return expressions[0] if len(expressions) == 1 else f"({' | '.join(expressions)})"

    def _literals(self, allowed: ParameterType) -> list[str]:
        """The spellings of listed values (`enum`, `const`) that are read back as these values."""
        found: list[str] = []
        for value in allowed.literals:
            if isinstance(value, str):
                written = json.dumps(value, ensure_ascii=False)
                spellings = [written if allowed.looks_other(value) else value]
                if any(word in spellings[0] for word in self._words):
                    continue
            else:
                spellings = [json.dumps(value, ensure_ascii=False), write_argument(value)]
            found += [text for text in dict.fromkeys(spellings) if same(allowed.read(text), value)]
        return found

    def _scalars(self, allowed: ParameterType, json_kinds: frozenset[str]) -> list[str]:
        free = {kind for kinds, _ in allowed.others for kind in kinds} - json_kinds
        return [f"/{_SCALARS[kind]}/" for kind in sorted(free)]

    def _texts(self, allowed: ParameterType, json_kinds: frozenset[str]) -> list[str]:
        """Strings written literally or, if they look like another type, as JSON strings."""
        looks = [LOOKS[kind] for kind in sorted(allowed.kinds)]
        banned: list[str] = []
        if looks:
            other = "|".join(looks)
            banned = [f"~/{other}/", rf'~/"["\\]*(?:{other})["\\]*"/']
        if allowed.kinds & json_kinds & _NUMBERS:
            banned.append("~/[-0-9](?s:.*)/")
        found: list[str] = []
        for conjunction in allowed.texts:
            try:
                regexes = [f"/{regex}/" for part in conjunction for regex in _regexes(part)]
            except DataError:
                if len(allowed.texts) == 1 and not (allowed.others or allowed.literals):
                    raise
                continue  # this alternative cannot be enforced, but others can
            found.append(f"({' & '.join([self._safe, *regexes, *banned])})")
            for kind in sorted(allowed.kinds & _SCALARS.keys()):
                content = " & ".join([f"/{LOOKS[kind]}/", *regexes])
                found.append(rf'("\"" ({content}) "\"")')
        return found

    def _terminal(self, body: str) -> str:
        if body not in self._named:
            self._named[body] = f"{self._rule.upper()}_T{len(self._named)}"
            self.rules.append(f"{self._named[body]}: {body}")
        return self._named[body]

    def _named_rule(self, body: str) -> str:
        if body not in self._named:
            self._named[body] = f"{self._rule}_j{len(self._named)}"
            self.rules.append(f"{self._named[body]}: {body}")
        return self._named[body]


def _schemas(allowed: ParameterType, json_kinds: frozenset[str]) -> list[Conjunction]:
    """Plain schemas of the values that the grammar of JSON covers."""
    found: list[Conjunction] = []
    for kinds, conjunction in allowed.others:
        named = kinds & json_kinds
        if named:
            named = named - {"integer"} if "number" in named else named
            found.append((*conjunction, {"type": sorted(named)}))
    return found


def _is_bounded(allowed: ParameterType) -> bool:
    """Whether some of its numbers have bounds, which only the grammar of JSON can enforce."""
    return any(
        kinds & _NUMBERS and any(_BOUNDS & set(part) for part in conjunction)
        for kinds, conjunction in allowed.others
    )


def _regexes(schema: Mapping[str, Json]) -> list[str]:
    unsupported = sorted(_UNENFORCEABLE & set(schema))
    if unsupported:
        raise DataError(f"{unsupported[0]!r} cannot be enforced for a string; leave it out")
    return string_regexes(schema)


def _head(name: str) -> str:
    return f"<parameter={name}>\n"


def _opening(name: str) -> str:
    return f"<parameter={name}>" if len(name) <= _MAX_NAME else f"<parameter={name[:_MAX_NAME]}"
