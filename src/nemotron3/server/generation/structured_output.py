"""The structured output of a request: a JSON schema, regex, choice or grammar."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from nemotron3.inference.requests import GrammarKind, StructuredOutput
from nemotron3.server.generation.tool_choice import ToolUse
from nemotron3.server.http.bodies import Body, Unsupported
from nemotron3.server.http.errors import invalid_request


class StructuredOutputsBody(Body):
    """vLLM's `structured_outputs`: exactly one of these fields is given."""

    # A field called `json` would hide a method of the base class.
    json_schema: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "structural_tag": Unsupported("write a `grammar` (Lark) instead"),
        "whitespace_pattern": Unsupported("write a `grammar` (Lark) that says where space may be"),
        "disable_any_whitespace": Unsupported("write a `grammar` (Lark)", (False,)),
        "disable_fallback": Unsupported("nothing falls back here", (False, True)),
        "disable_additional_properties": Unsupported(
            "say `additionalProperties: false` in the schema", (False,)
        ),
    }


def structured_output(body: StructuredOutputsBody | None) -> StructuredOutput | None:
    """The structured output of vLLM's `structured_outputs`."""
    if body is None:
        return None
    said: dict[GrammarKind, Any] = {
        "json_schema": body.json_schema,
        "regex": body.regex,
        "choice": body.choice,
        "grammar": body.grammar,
        "json_object": True if body.json_object else None,
    }
    named: list[tuple[GrammarKind, Any]] = [each for each in said.items() if each[1] is not None]
    if len(named) != 1:
        found = ", ".join("json" if kind == "json_schema" else kind for kind, _ in named)
        raise invalid_request(
            f"structured_outputs has {found or 'nothing'}; give one of json, regex, choice, "
            f"grammar, json_object",
            "structured_outputs",
        )
    kind, value = named[0]
    return StructuredOutput(
        kind=kind,
        value=None if kind == "json_object" else value,
        source=f"structured_outputs.{'json' if kind == 'json_schema' else kind}",
    )


def select_structured_output(
    tools: ToolUse, *outputs: StructuredOutput | None
) -> StructuredOutput | None:
    """The structured output of a request from any of its fields; raises if there are several."""
    given = [output for output in outputs if output is not None]
    if not given:
        return tools.structured
    wanted, name = given[0], given[0].source
    if any(output != wanted for output in given):
        names = " and ".join(str(output.source) for output in given)
        raise invalid_request(f"{names} ask for different outputs; give one of them", name)
    if tools.listed:
        raise invalid_request(
            f"{name} says what the whole answer is, so no tool could be called; send "
            f"tool_choice: 'none', or leave one of them out",
            name,
        )
    return wanted


def json_structured_output(
    kind: str, schema: Mapping[str, Any] | None, where: str
) -> StructuredOutput | None:
    """The structured output of OpenAI's types `text`, `json_object` and `json_schema`."""
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutput(kind="json_object", source=where)
    if schema is None:
        raise invalid_request(f"{where} is of type json_schema and has no schema", where)
    return StructuredOutput(kind="json_schema", value=schema, source=where)
