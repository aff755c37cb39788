"""A server of an environment on a port of this machine, while a test wants it."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import uvicorn

from nemotron3.environments import Environment, Row, TaskResponse, Verification, field_of
from nemotron3.server.gym.app import GymServer, GymSettings, create_gym_app
from nemotron3.text import Tool


@contextmanager
def serving(environment: Environment, **settings: Any) -> Iterator[tuple[str, GymServer]]:
    """Serve an environment; its address, and the server."""
    server = create_gym_app(environment, GymSettings(**settings))
    config = uvicorn.Config(server.app, port=0, log_config=None, access_log=False, ws="none")
    runner = uvicorn.Server(config)
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    while not runner.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{runner.servers[0].sockets[0].getsockname()[1]}", server
    finally:
        runner.should_exit = True
        thread.join(30)


class Counter(Environment):
    """NeMo Gym's `example_session_state_mgmt` as an environment of ours."""

    name = "counter"
    tools = (
        Tool(
            name="increment_counter",
            parameters={
                "type": "object",
                "properties": {"count": {"type": "integer"}},
                "required": ["count"],
            },
        ),
        Tool(name="get_counter_value", parameters={"type": "object", "properties": {}}),
    )
    max_turns = 8

    def draw(self, random) -> Row:
        first, wanted = random.randint(0, 9), random.randint(0, 99)
        return self.row(f"{first} to {wanted}", initial_count=first, expected_count=wanted)

    async def seed_session(self, row: Row) -> dict[str, int]:
        return {"count": field_of(row, "initial_count", int)}

    async def run_tool(self, session, name, arguments) -> str:
        if name == "get_counter_value":
            return f'{{"count":{session["count"]}}}'
        session["count"] += arguments["count"]
        return '{"success":true}'

    async def verify(self, row: Row, response: TaskResponse, session: Any) -> Verification:
        del response
        return Verification(reward=float(session["count"] == field_of(row, "expected_count", int)))


def post(url: str, path: str, body: Any = None, **options: Any) -> httpx2.Response:
    """One request, without cookies unless they are given."""
    content = {"content" if isinstance(body, bytes) else "json": {} if body is None else body}
    # Without `verify` every request would read the certificates of the machine.
    return httpx2.post(f"{url}{path}", timeout=30, verify=False, **content, **options)


def get(url: str, path: str) -> httpx2.Response:
    """One request."""
    return httpx2.get(f"{url}{path}", timeout=30, verify=False)
