"""Records in JSON, YAML, XML, TOML or CSV that parse and fit a schema.

At difficulty 0 two fields in JSON, named by letters; then more fields, lists, nested objects,
tables, and the other formats. Half of the fields ask for a type alone, the others for a range, a
choice or one value, so that a record learned by heart fits few of the tasks. A key that stands
twice is refused.

Rows have NeMo Gym's fields of its environment `structured_outputs`: `schema_str`, `schema_type`.
"""

import json
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, ClassVar, cast

from nemotron3.environments.answers import MAX_ANSWER, answer_turn, with_format
from nemotron3.environments.environment import Environment
from nemotron3.environments.formats import READERS, ROOT, WRITERS, FormatError, is_available
from nemotron3.environments.json_schema import schema_error
from nemotron3.environments.response import TaskResponse
from nemotron3.environments.rows import Row, field_of
from nemotron3.environments.verification import Verification
from nemotron3.environments.words import EASY_WORDS, LETTERS, WORDS
from nemotron3.errors import ConfigError, DataError
from nemotron3.text import AssistantMessage

Schema = dict[str, Any]


class StructuredOutput(Environment):
    """Records that fit a schema, in five formats."""

    name: ClassVar[str] = "structured_output"

    def __init__(self, *, difficulty: float = 0.5, formats: tuple[str, ...] | None = None) -> None:
        """`formats` are asked for equally often.

        The default is JSON alone below difficulty 0.2 and every readable one above (YAML needs
        PyYAML). Raises `ConfigError` for an unknown format.
        """
        super().__init__(difficulty=difficulty)
        if formats is None:
            formats = tuple(kind for kind in READERS if is_available(kind))
            formats = ("json",) if difficulty < 0.2 else formats
        unknown = [kind for kind in formats if kind not in READERS]
        if unknown or not formats:
            raise ConfigError(f"formats are {formats}; give some of {', '.join(READERS)}")
        self.formats = formats

    def draw(self, random: Random) -> Row:
        """A schema, told in words or as it is."""
        kind = random.choice(self.formats)
        schema = _schema(random, self.difficulty, kind)
        text = json.dumps(schema, separators=(",", ":"))
        if random.random() < self.difficulty - 0.5:
            told = f"that fits this JSON schema: {text}"
        else:
            told = _in_words(schema)
        root = f" (root: {ROOT})" if kind == "xml" else ""
        prompt = f"{kind.upper()}{root} {told}"
        return self.row(
            with_format(prompt, f"Answer with the {kind.upper()} alone.", self.difficulty),
            schema_str=text,
            schema_type=kind,
            solution=WRITERS[kind](_value(random, schema)),
        )

    def solve(self, row: Row) -> list[AssistantMessage]:
        """The names of the fields, then a record that was drawn with the schema."""
        schema = json.loads(field_of(row, "schema_str", str))
        names = ", ".join(schema.get("items", schema)["properties"])
        return [answer_turn(field_of(row, "solution", str), names)]

    async def verify(self, row: Row, response: TaskResponse, session: Any) -> Verification:
        """1 for a text that is the format, whole, and fits the schema."""
        del session
        kind = field_of(row, "schema_type", str)
        if kind not in READERS:
            raise DataError(f"the row's schema_type is {kind!r}; there are {', '.join(READERS)}")
        try:
            schema: Schema = json.loads(field_of(row, "schema_str", str))
        except json.JSONDecodeError as error:
            raise DataError(f"the row's schema_str is not JSON: {error}") from error
        if not isinstance(schema, dict):
            raise DataError(f"the row's schema_str is {schema!r}; give a JSON object")
        answer = response.answer
        problem = None
        is_read = False
        if not answer or len(answer) > MAX_ANSWER:
            problem = "no answer" if not answer else f"more than {MAX_ANSWER} characters"
        else:
            try:
                value = READERS[kind](answer, schema)
                is_read = True
                problem = schema_error(value, schema)
            except FormatError as error:
                problem = str(error)
        components = {"format": is_read, "schema": is_read and problem is None}
        return Verification.all_of(components, answer=answer[:80], problem=problem)


def _schema(random: Random, difficulty: float, kind: str) -> Schema:
    num_fields = random.randint(2, 2 + round(5 * difficulty))
    pool = _names(difficulty)
    names = random.sample(pool, num_fields)
    if kind == "csv":
        fields = {name: _scalar(random, pool) for name in names}
        count = random.randint(1, 1 + round(4 * difficulty))
        return {"type": "array", "items": _object(fields), "minItems": count, "maxItems": count}
    return _object({name: _field(random, difficulty) for name in names})


def _object(fields: dict[str, Schema]) -> Schema:
    return {
        "type": "object",
        "properties": fields,
        "required": list(fields),
        "additionalProperties": False,
    }


def _field(random: Random, difficulty: float) -> Schema:
    if random.random() < 0.4 * difficulty:
        inside = random.sample(_names(difficulty), 2)
        return _object({name: _scalar(random, _names(difficulty)) for name in inside})
    if random.random() < 0.1 + 0.2 * difficulty:
        count = random.randint(1, 3)
        kind = random.choice(["integer", "string", "boolean"])
        return {"type": "array", "items": {"type": kind}, "minItems": count, "maxItems": count}
    return _scalar(random, _names(difficulty))


def _names(difficulty: float) -> Sequence[str]:
    """What fields and their values are named after: letters are easier to copy than words."""
    return LETTERS if difficulty < 0.2 else WORDS


def _scalar(random: Random, pool: Sequence[str]) -> Schema:
    low = random.randint(0, 90)
    return random.choice(
        [
            {"type": "integer"},
            {"type": "integer", "minimum": low, "maximum": low + random.randint(1, 9)},
            {"type": "string"},
            {"type": "string", "enum": random.sample(pool, 2)},
            {"type": "string", "const": random.choice(pool)},
            {"type": "boolean"},
        ]
    )


def _in_words(schema: Schema) -> str:
    if schema["type"] == "array":
        fields = _fields_in_words(schema["items"])
        return f"table of {_number(schema['minItems'], 'row')} with {fields}"
    return f"with {_fields_in_words(schema)}"


def _fields_in_words(schema: Schema) -> str:
    fields = cast(Mapping[str, Schema], schema["properties"])
    return ", ".join(f"{name}: {_type_in_words(part)}" for name, part in fields.items())


def _type_in_words(schema: Schema) -> str:
    match schema:
        case {"const": value}:
            return json.dumps(value)
        case {"enum": values}:
            return " or ".join(map(json.dumps, values))
        case {"type": "integer", "minimum": low, "maximum": high}:
            return f"integer {low} to {high}"
        case {"type": "array", "items": items, "minItems": count}:
            return f"list of {_number(count, items['type'])}"
        case {"type": "object"}:
            return "{" + _fields_in_words(schema) + "}"
        case _:
            return schema["type"]


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _value(random: Random, schema: Schema) -> Any:
    match schema:
        case {"const": value}:
            return value
        case {"enum": values}:
            return random.choice(values)
        case {"type": "integer"}:
            return random.randint(schema.get("minimum", 0), schema.get("maximum", 99))
        case {"type": "string"}:
            return random.choice(EASY_WORDS)
        case {"type": "boolean"}:
            return random.random() < 0.5
        case {"type": "array", "items": items, "minItems": count}:
            return [_value(random, items) for _ in range(count)]
        case _:
            return {name: _value(random, part) for name, part in schema["properties"].items()}
