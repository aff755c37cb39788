"""Office work with database tools, judged by the state that is left.

    Task 12: set status to done. Then make a note: title pear, author Ada, color red.

Whatever calls were made, the databases must in the end be those that the right calls leave: what
was done beside the request counts as wrong, and an announcement without calls changes nothing. At
difficulty 0 one table and requests that name a record by its id; at 1 five tables with twenty
tools, up to three requests, and records that must be found by their fields first.

Rows have NeMo Gym's fields of its environment `workplace_assistant`: `ground_truth` (calls),
`category`.
"""

from collections.abc import Mapping
from random import Random
from typing import Any, ClassVar, cast

from nemotron3.environments.answers import answer_turn, call_turns
from nemotron3.environments.environment import Environment
from nemotron3.environments.response import TaskResponse
from nemotron3.environments.rows import Row, field_of
from nemotron3.environments.verification import Verification
from nemotron3.environments.words import NAMES, WORDS
from nemotron3.environments.workplace_database import (
    CHOICES,
    FIELDS,
    Database,
    Record,
    Tables,
    tools_for,
)
from nemotron3.text import AssistantMessage

Call = tuple[str, dict[str, Any]]
_PEOPLE = ("owner", "sender", "guest", "contact", "author")


class Workplace(Environment):
    """Requests to a small office's databases, judged by their final state."""

    name: ClassVar[str] = "workplace"
    tools = tools_for(tuple(FIELDS))
    max_turns = 32

    def draw(self, random: Random) -> Row:
        """An office, and requests each of which changes it."""
        num_records = random.randint(2, 3 + round(5 * self.difficulty))
        names = tuple(FIELDS)[: 1 + round(4 * self.difficulty)]
        tables = {name: _records(random, name, num_records) for name in names}
        office = Database(tables)
        told: list[str] = []
        calls: list[Call] = []
        for _ in range(random.randint(1, 1 + round(2 * self.difficulty))):
            text, needed = _request(random, office.tables, self.difficulty)
            for name, arguments in needed:
                office.run(name, arguments)
            told.append(text)
            calls += needed
        if office.is_same(Database(tables), tables):  # one request took back another
            return self.draw(random)
        return self.row(
            " Then: ".join(told),
            tools=tools_for(names),
            database=tables,
            ground_truth=[{"name": name, "arguments": given} for name, given in calls],
            category="+".join(sorted({name.partition("_")[0] for name, _ in calls})),
        )

    def solve(self, row: Row) -> list[AssistantMessage]:
        """The calls one by one, searches included, and a last word."""
        calls = _ground_truth(row)
        steps = [f"{name.replace('_', ' ')} {given.get('id', '')}".strip() for name, given in calls]
        return [*call_turns(calls, steps), answer_turn("Done.", "all done")]

    async def seed_session(self, row: Row) -> Database:
        """The office as it is at first."""
        return Database(cast(Tables, field_of(row, "database", dict)))

    async def run_tool(self, session: Database, name: str, arguments: Mapping[str, Any]) -> str:
        """Search or change the office of this rollout."""
        return session.run(name, arguments)

    async def verify(self, row: Row, response: TaskResponse, session: Database) -> Verification:
        """1 where the databases are as the right calls leave them, and the rollout has ended."""
        initial = cast(Tables, field_of(row, "database", dict))
        expected = Database(initial)
        for name, arguments in _ground_truth(row):
            expected.run(name, arguments)
        return Verification.all_of(
            {"ended": bool(response.answer), "state": session.is_same(expected, initial)},
            answer=response.answer[:40],
            num_calls=len(response.tool_calls),
        )


def _ground_truth(row: Row) -> list[Call]:
    calls = cast(list[dict[str, Any]], field_of(row, "ground_truth", list))
    return [(call["name"], call["arguments"]) for call in calls]


def _records(random: Random, table: str, count: int) -> list[Record]:
    ids = sorted(random.sample(range(10, 100), count))
    return [{"id": i, **_values(random, table)} for i in ids]


def _values(random: Random, table: str) -> dict[str, str]:
    return {field: _value(random, field) for field in FIELDS[table]}


def _value(random: Random, field: str) -> str:
    if field in CHOICES:
        return random.choice(CHOICES[field])
    return random.choice(NAMES if field in _PEOPLE else WORDS)


def _request(random: Random, tables: Tables, difficulty: float) -> tuple[str, list[Call]]:
    """A request in words, and the calls that fulfil it."""
    kinds = [_update, _update, _create, _delete, _update_found, _delete_found]
    kind = random.choice(kinds[: 4 + round(2 * difficulty)])
    names = [name for name in tables if tables[name]]
    if not names:
        return _create(random, tables, next(iter(tables)))
    return kind(random, tables, random.choice(names))


def _other_value(random: Random, field: str, value: str) -> str:
    while (other := _value(random, field)) == value:
        pass
    return other


def _update(random: Random, tables: Tables, table: str) -> tuple[str, list[Call]]:
    record = random.choice(tables[table])
    field = random.choice(FIELDS[table])
    value = _other_value(random, field, record[field])
    given = {"id": record["id"], "field": field, "value": value}
    text = f"{table.capitalize()} {record['id']}: set {field} to {value}."
    return text, [(f"{table}_update", given)]


def _create(random: Random, tables: Tables, table: str) -> tuple[str, list[Call]]:
    del tables
    values = _values(random, table)
    told = ", ".join(f"{field} {value}" for field, value in values.items())
    return f"Make a new {table}: {told}.", [(f"{table}_create", values)]


def _delete(random: Random, tables: Tables, table: str) -> tuple[str, list[Call]]:
    record = random.choice(tables[table])
    return f"Delete {table} {record['id']}.", [(f"{table}_delete", {"id": record["id"]})]


def _update_found(random: Random, tables: Tables, table: str) -> tuple[str, list[Call]]:
    """All records with some value of one field get another value of the same or another field."""
    known, changed = random.choices(FIELDS[table], k=2)
    value = random.choice(tables[table])[known]
    found = [record for record in tables[table] if record[known] == value]
    new = _other_value(random, changed, found[0][changed])
    calls: list[Call] = [(f"{table}_search", {"field": known, "value": value})]
    calls += [
        (f"{table}_update", {"id": record["id"], "field": changed, "value": new})
        for record in found
    ]
    return f"Each {table} with {known} {value}: set {changed} to {new}.", calls


def _delete_found(random: Random, tables: Tables, table: str) -> tuple[str, list[Call]]:
    known = random.choice(FIELDS[table])
    value = random.choice(tables[table])[known]
    found = [record for record in tables[table] if record[known] == value]
    calls: list[Call] = [(f"{table}_search", {"field": known, "value": value})]
    calls += [(f"{table}_delete", {"id": record["id"]}) for record in found]
    return f"Delete each {table} with {known} {value}.", calls
