"""The databases of a small office, and the tools that search and change them.

Five tables (tasks, emails, events, customers, notes), and four tools for each. Records are flat,
values are texts, and ids are numbers, so that the state of an office is plain JSON and two states
can be compared.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from nemotron3.environments.environment import ERROR
from nemotron3.text import Tool

Record = dict[str, Any]
Tables = dict[str, list[Record]]

FIELDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "task": ("title", "owner", "status"),
        "email": ("sender", "subject", "folder"),
        "event": ("title", "guest", "day"),
        "customer": ("name", "contact", "stage"),
        "note": ("title", "author", "color"),
    }
)
"""The fields of each table beside `id`."""

CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "status": ("open", "started", "done"),
        "folder": ("inbox", "archive", "spam"),
        "day": ("monday", "tuesday", "wednesday", "thursday", "friday"),
        "stage": ("lead", "trial", "won", "lost"),
        "color": ("red", "blue", "green"),
    }
)
"""Fields with a few values."""


class Database:
    """The tables of one rollout; `run` answers as a tool does, errors included."""

    def __init__(self, tables: Tables) -> None:
        self.tables = {name: [dict(each) for each in table] for name, table in tables.items()}

    def run(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Run a tool whose arguments fit its schema."""
        table, _, verb = name.partition("_")
        records = self.tables.get(table)
        if records is None:
            return f"{ERROR}there is no {table} here"
        match verb:
            case "search":
                return self._search(records, arguments["field"], arguments["value"])
            case "create":
                return self._create(records, arguments)
            case _:
                found = next((each for each in records if each["id"] == arguments["id"]), None)
                if found is None:
                    return f"{ERROR}there is no {table} {arguments['id']}"
                if verb == "delete":
                    records.remove(found)
                    return "deleted"
                found[arguments["field"]] = arguments["value"]
                return told(found)

    def is_same(self, other: "Database", initial: Tables) -> bool:
        """Whether two states agree; records that are not in `initial` may have any ids."""
        if self.tables.keys() != other.tables.keys():
            return False
        return all(
            _state(self.tables[name], initial[name]) == _state(other.tables[name], initial[name])
            for name in self.tables
        )

    def _search(self, records: Sequence[Record], field: str, value: str) -> str:
        found = [told(each) for each in records if str(each[field]).lower() == value.lower()]
        return "\n".join(found) or "nothing found"

    def _create(self, records: list[Record], arguments: Mapping[str, Any]) -> str:
        created = {"id": max((each["id"] for each in records), default=9) + 1, **arguments}
        records.append(created)
        return told(created)


def told(record: Record) -> str:
    """A record on one line."""
    return " ".join(f"{key}={value}" for key, value in record.items())


def tools_for(tables: Sequence[str]) -> tuple[Tool, ...]:
    """Search, create, update and delete, for each table."""
    return tuple(tool for table in tables for tool in _tools(table))


def _tools(table: str) -> list[Tool]:
    fields = FIELDS[table]
    number = {"id": {"type": "integer"}}
    field = {"field": {"type": "string", "enum": list(fields)}}
    value = {"value": {"type": "string"}}
    values = {
        name: {"type": "string"} | ({"enum": list(CHOICES[name])} if name in CHOICES else {})
        for name in fields
    }
    return [
        _tool(f"{table}_search", f"Find each {table} with a value.", field | value),
        _tool(f"{table}_create", f"Make a new {table}.", values),
        _tool(f"{table}_update", f"Change one field of a {table}.", number | field | value),
        _tool(f"{table}_delete", f"Delete a {table}.", number),
    ]


def _tool(name: str, description: str, properties: dict[str, Any]) -> Tool:
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return Tool(name=name, description=description, parameters=schema)


def _state(
    records: Sequence[Record], initial: Sequence[Record]
) -> tuple[dict[int, Record], Counter[str]]:
    """Records that were there at first by id, and the new ones without their ids."""
    known = {each["id"] for each in initial}
    kept = {each["id"]: each for each in records if each["id"] in known}
    new = Counter(
        told({k: v for k, v in sorted(each.items()) if k != "id"})
        for each in records
        if each["id"] not in known
    )
    return kept, new
