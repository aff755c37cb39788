"""Grammars that end a process which compiles them: they overflow its stack."""

from nemotron3.inference.requests import StructuredOutput


def chain(length):
    """A schema whose definitions refer to each other one after another."""
    definitions = {
        f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}}
        for i in range(length)
    }
    return {"$defs": {**definitions, f"d{length}": {"type": "integer"}}, "$ref": "#/$defs/d0"}


def rules(length):
    """A Lark grammar whose rules do the same."""
    lines = [f"r{i}: r{i + 1}" for i in range(length)]
    return "\n".join(["start: r0", *lines, f'r{length}: "a"', ""])


def chained_tool(length):
    """A tool with a parameter of such a schema."""
    schema = chain(length)
    parameters = {
        "type": "object",
        "properties": {"a": {"$ref": schema["$ref"]}},
        "required": ["a"],
        "$defs": schema["$defs"],
    }
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


KILLERS = {
    "schema": StructuredOutput(kind="json_schema", value=chain(1000)),
    "grammar": StructuredOutput(kind="grammar", value=rules(5000)),
}
