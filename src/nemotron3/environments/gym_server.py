"""Environments of others: a resources server of NeMo Gym that runs elsewhere, driven over HTTP.

    environment = GymServerEnvironment("http://127.0.0.1:8001", "train.jsonl")
    environment = load_environment("train.jsonl@http://127.0.0.1:8001")       # the same by name

The tasks are rows of a JSONL file in NeMo Gym's format, such as the `data/example.jsonl` of every
resources server; what verifies them is on the server. A policy sees what it would see of NeMo Gym's
simple agent: a tool's answer is the body that the server sends, errors included.

Where the server fails, the rollout fails and has no reward: a request that nobody answers, a status
of 500 or more, a judge's failure (`_ng_failure_class`), an answer without a reward. A row that the
server refuses is a `DataError`, because no other row of that file would fare better.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, cast
from urllib.parse import parse_qsl, quote, urlsplit, urlunsplit

from nemotron3.environments.environment import ERROR, Environment
from nemotron3.environments.gym_protocol import (
    RESERVED,
    SEED_SESSION,
    VERIFY,
    read_verification,
    verify_body,
)
from nemotron3.environments.http_client import HttpClient, HttpLimits, Reply, ServerFailedError
from nemotron3.environments.response import TaskResponse
from nemotron3.environments.rows import Row, Split, environment_of, prompt_text, split_of, tools_of
from nemotron3.environments.verification import FailureKind, RolloutFailedError, Verification
from nemotron3.errors import ConfigError, DataError

_MAX_TOOL_TEXT = 2**20
"""Characters that a tool may answer; no context would hold more."""
_INVALID_ROW = 422
"""The status of a body that does not fit the server's types."""


@dataclass
class GymSession:
    """One rollout on the server."""

    cookies: dict[str, str] = field(default_factory=dict[str, str])
    """They say which of its sessions this is."""
    tools: frozenset[str] = frozenset()
    """What this row's policy may call."""


class GymServerEnvironment(Environment):
    """The tasks of a file, and a resources server of NeMo Gym that verifies them."""

    name = "gym"

    def __init__(
        self,
        url: str,
        data: str | Path,
        *,
        held_out: str | Path | None = None,
        agent: str | None = None,
        max_turns: int = 16,
        limits: HttpLimits | None = None,
    ) -> None:
        """Read the rows and ask whether the server is there.

        Held-out tasks are the rows of `held_out`, or without it those of `data` whose prompts a
        hash puts there, as for every environment. `agent` chooses the rows of one `agent_ref` in a
        blend, and names the environment where rows have none. `max_turns` ends a rollout. Raises
        `ConfigError` for a server that is not there or is none, `DataError` for rows.
        """
        if max_turns < 1:
            raise ConfigError(f"is {max_turns}; it must be 1 or more", field="max_turns")
        self._client = HttpClient(url, limits or HttpLimits())
        self._data, self.max_turns = Path(data), max_turns
        rows = _read_rows(self._data, agent)
        self.name = agent or _agent_name(rows, self._data) or urlsplit(url).netloc
        self._rows = _by_split(rows, self._data, held_out, agent)
        self.tools = _all_tools(rows)
        super().__init__()
        self._assert_there()

    def draw(self, random: Random) -> Row:
        """Any row of the file."""
        return self._named(random.choice([row for rows in self._rows.values() for row in rows]))

    def task(self, index: int, *, split: str | Split = Split.TRAIN, seed: int = 0) -> Row:
        """Row number `index` of a side, and after the last the first one again.

        The order is that of the file, which in NeMo Gym is the curriculum, so no `seed` changes it.
        """
        del seed
        rows = self._rows[Split.named(split)]
        if not rows:
            raise DataError(
                f"{self._data} has no {Split.named(split)} rows, which are one in eight by a hash "
                "of their prompts; give more rows, or held-out ones in a file of their own "
                "(?held_out=FILE)"
            )
        return self._named(rows[index % len(rows)])

    def distinct_tasks(
        self, num_tasks: int, *, split: str | Split = Split.HELD_OUT, seed: int = 0
    ) -> list[Row]:
        """The first rows of a side whose prompts differ; `DataError` where there are too few."""
        del seed
        found: dict[str, Row] = {}
        for row in self._rows[Split.named(split)]:
            found.setdefault(prompt_text(row), self._named(row))
            if len(found) == num_tasks:
                return list(found.values())
        raise DataError(
            f"environment {self.name} has {len(found)} {Split.named(split)} rows with different "
            f"prompts, {num_tasks} are wanted; ask for fewer (in a run: --held-out-tasks and "
            "--final-held-out-tasks), or give more rows"
        )

    async def seed_session(self, row: Row) -> GymSession:
        """Begin a session on the server."""
        session = GymSession(tools=frozenset(tool.name for tool in tools_of(row)))
        reply = await self._post(
            SEED_SESSION, row, session, kind=FailureKind.ENVIRONMENT, may_repeat=True
        )
        self._assert_taken(reply, SEED_SESSION)
        return session

    async def call_tool(self, session: GymSession, name: str, arguments: Mapping[str, Any]) -> str:
        """Send a call; whatever the server answers is for the policy to read.

        It is sent once: what the tool did to the session is not known where no answer came.
        """
        if name not in session.tools:
            return f"{ERROR}there is no tool {name[:40]}"
        reply = await self._post(
            quote(name, safe=""), dict(arguments), session, kind=FailureKind.TOOL, may_repeat=False
        )
        if len(reply.text) > _MAX_TOOL_TEXT:
            raise RolloutFailedError(
                FailureKind.TOOL,
                f"{name} of {self._client.url} answered {len(reply.text):,} characters",
            )
        return reply.text

    async def verify(self, row: Row, response: TaskResponse, session: GymSession) -> Verification:
        """Have the server judge a response."""
        body = verify_body(row, response)
        reply = await self._post(VERIFY, body, session, kind=FailureKind.JUDGE, may_repeat=True)
        self._assert_taken(reply, VERIFY)
        try:
            return read_verification(reply.json(), row)
        except ServerFailedError as error:
            return Verification.failed(FailureKind.ENVIRONMENT, f"{self._client.url}: {error}")

    async def _post(
        self, path: str, body: Any, session: GymSession, *, kind: FailureKind, may_repeat: bool
    ) -> Reply:
        try:
            reply = await self._client.post(
                f"/{path}", body, cookies=session.cookies, may_repeat=may_repeat
            )
        except ServerFailedError as error:
            raise RolloutFailedError(kind, str(error)) from error
        session.cookies |= reply.cookies
        return reply

    def _assert_taken(self, reply: Reply, path: str) -> None:
        if reply.status < 300:
            return
        said = f"{self._client.url}/{path} answered {reply.status}: {reply.text[:500]}"
        if reply.status in (404, 405):
            raise ConfigError(f"{said}; it is no resources server of NeMo Gym")
        if reply.status == _INVALID_ROW:
            raise DataError(f"{said}; are the rows of {self._data} those of this server?")
        raise RolloutFailedError(FailureKind.ENVIRONMENT, said)

    def _assert_there(self) -> None:
        """Ask the server for its addresses; one that does not describe itself is taken as it is."""
        url = self._client.url
        try:
            reply = self._client.get("/openapi.json")
        except ServerFailedError as error:
            raise ConfigError(f"environment {self.name}: {error}") from error
        try:
            described = reply.json() if reply.status == 200 else None
        except ServerFailedError:
            described = None
        paths: Any = described.get("paths") if isinstance(described, dict) else None
        if isinstance(paths, dict) and f"/{VERIFY}" not in paths:
            has = ", ".join(list(cast(dict[str, Any], paths))[:6])
            raise ConfigError(
                f"{url} is no resources server of NeMo Gym: it has no /{VERIFY} (it has {has})"
            )

    def _named(self, row: Row) -> Row:
        """The row with the name by which rollouts find this environment."""
        return {**row, "agent_ref": {"type": "responses_api_agents", "name": self.name}}


def environment_at(address: str) -> GymServerEnvironment:
    """The environment of ROWS@URL, with options after a question mark.

    `train.jsonl@http://127.0.0.1:8001?held_out=test.jsonl&max_turns=8`; the options are `held_out`,
    `agent`, `max_turns` and `timeout_s`. Raises `ConfigError` for another one.
    """
    files, url, options = _parts(address)
    unknown = options.keys() - {"held_out", "agent", "max_turns", "timeout_s"}
    if unknown:
        raise ConfigError(
            f"{address}: no option {sorted(unknown)[0]!r}; there are held_out, agent, max_turns, "
            "timeout_s"
        )
    return GymServerEnvironment(
        url,
        files[0],
        held_out=files[1] if len(files) > 1 else None,
        agent=options.get("agent"),
        max_turns=_number(address, options, "max_turns", int, 16),
        limits=HttpLimits(timeout_s=_number(address, options, "timeout_s", float, 60.0)),
    )


def files_at(address: str) -> list[Path]:
    """The files of rows that ROWS@URL names."""
    return _parts(address)[0]


def is_address(name: str) -> bool:
    """Whether a name is that of a server."""
    return "://" in name


def _parts(address: str) -> tuple[list[Path], str, dict[str, str]]:
    rows, _, rest = address.partition("@")
    at = urlsplit(rest)
    if not rows or "://" in rows or not rest:
        raise ConfigError(
            f"{address!r} names a server and no rows; write ROWS@URL, such as "
            "train.jsonl@http://127.0.0.1:8001"
        )
    options = dict(parse_qsl(at.query, keep_blank_values=True))
    held_out = [Path(options["held_out"])] if options.get("held_out") else []
    return [Path(rows), *held_out], urlunsplit(at._replace(query="")), options


def _number(address: str, options: Mapping[str, str], name: str, kind: type, default: float) -> Any:
    try:
        return kind(options.get(name, default))
    except ValueError:
        raise ConfigError(f"{address}: {name} is {options[name]!r}, no number") from None


def _read_rows(file: Path, agent: str | None) -> list[Row]:
    """The rows of a file, each checked; with `agent` those that are for it or for nobody."""
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({error}); give a JSONL file of rows") from error
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
            if not isinstance(row, dict):
                raise DataError(f"is of type {type(row).__name__}, an object was expected")
            prompt_text(cast(Row, row))
            if clash := [tool.name for tool in tools_of(cast(Row, row)) if tool.name in RESERVED]:
                raise DataError(f"has a tool {clash[0]!r}, an address of the server itself")
        except ValueError as error:  # JSON's errors and our own
            raise DataError(f"{file}, line {number}: {error}") from error
        rows.append(cast(Row, row))
    mine = [row for row in rows if agent is None or row.get("agent_ref") is None
            or environment_of(row) == agent]  # fmt: skip
    if not mine:
        of = "" if agent is None else f" of agent {agent}"
        raise DataError(f"{file} has no rows{of}; give a JSONL file of NeMo Gym's rows")
    return mine


def _agent_name(rows: Sequence[Row], file: Path) -> str | None:
    """The one agent that the rows are for; None where they do not say."""
    names = {environment_of(row) for row in rows if row.get("agent_ref") is not None}
    if len(names) > 1:
        raise DataError(
            f"{file} has rows for {len(names)} agents ({', '.join(sorted(names)[:5])}); choose one "
            "(?agent=NAME)"
        )
    return names.pop() if names else None


def _by_split(
    rows: Sequence[Row], file: Path, held_out: str | Path | None, agent: str | None
) -> dict[Split, list[Row]]:
    if held_out is None:
        return {side: [row for row in rows if split_of(row) is side] for side in Split}
    other = _read_rows(Path(held_out), agent)
    both = {prompt_text(row) for row in rows} & {prompt_text(row) for row in other}
    if both:
        raise DataError(
            f"{len(both)} prompts are in {file} and in {held_out}, such as "
            f"{sorted(both)[0][:60]!r}; held-out tasks must not be trained on"
        )
    return {Split.TRAIN: list(rows), Split.HELD_OUT: other}


def _all_tools(rows: Sequence[Row]) -> tuple[Any, ...]:
    """Every tool of every row, the first of each name."""
    found = {tool.name: tool for row in reversed(rows) for tool in tools_of(row)}
    return tuple(found.values())
