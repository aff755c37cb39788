"""Record what real resources servers of NeMo Gym answer, into `fixtures/gym`.

In an environment of its own, since NeMo Gym pins packages and brings 159 of them:

    python3.12 -m venv /tmp/gym && /tmp/gym/bin/pip install nemo-gym==0.4.0 tokenizers
    PYTHONPATH=src:. /tmp/gym/bin/python -m tests.environments.record_gym_fixtures

Each server runs with uvicorn on a port of this machine, without Ray and without NeMo Gym's head
server. Our own client plays the scenarios; every request and answer is written, with the results.
"""

import asyncio
import importlib
import json
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import resources_servers
import uvicorn
from nemo_gym.base_resources_server import BaseResourcesServerConfig, SimpleResourcesServer
from nemo_gym.server_utils import ServerClient

from nemotron3.environments.http_client import HttpClient
from tests.environments.gym_scenarios import FIXTURES, SCENARIOS, environment_of_rows

SERVERS = Path(next(iter(resources_servers.__path__)))


class Recorder(HttpClient):
    """Our client, which writes down what it sends and gets."""

    exchanges: list[dict[str, Any]]
    sessions: list[str]
    """What the cookies of each session have in common: content without time and signature."""

    def _once(self, method, path, data, cookies):
        reply, wait_s = super()._once(method, path, data, cookies)
        if method == "POST":
            request = {"path": path, "body": json.loads(data), "has_cookie": bool(cookies)}
            content = "".join(each.partition(".")[0] for each in reply.cookies.values())
            if content not in self.sessions:
                self.sessions.append(content)
            answer = {"status": reply.status, "body": reply.text, "cookies": list(reply.cookies)}
            session = self.sessions.index(content)
            self.exchanges.append({"request": request, "answer": answer, "session": session})
        return reply, wait_s


def serve(name: str) -> tuple[uvicorn.Server, str]:
    """A resources server, and its address."""
    module = importlib.import_module(f"resources_servers.{name}.app")
    found = [
        kind
        for kind in vars(module).values()
        if isinstance(kind, type)
        and kind.__module__ == module.__name__
        and issubclass(kind, (SimpleResourcesServer, BaseResourcesServerConfig))
    ]
    config_kind = next(kind for kind in found if issubclass(kind, BaseResourcesServerConfig))
    server_kind = next(kind for kind in found if issubclass(kind, SimpleResourcesServer))
    config = config_kind(host="127.0.0.1", port=0, entrypoint="app.py", name=name)
    app = server_kind(config=config, server_client=MagicMock(spec=ServerClient))
    web = app.setup_webserver()
    app.setup_exception_middleware(web)
    runner = uvicorn.Server(uvicorn.Config(web, port=0, log_level="warning"))
    threading.Thread(target=runner.run, daemon=True).start()
    while not runner.started:
        time.sleep(0.01)
    port = runner.servers[0].sockets[0].getsockname()[1]
    return runner, f"http://127.0.0.1:{port}"


def record(name: str) -> None:
    """Play the scenario of a server and write its fixture."""
    runner, url = serve(name)
    text = (SERVERS / name / "data" / "example.jsonl").read_text("utf-8")
    rows = [_short(json.loads(text.splitlines()[0]))]
    with tempfile.TemporaryDirectory() as folder:
        environment = environment_of_rows(url, rows, Path(folder))
        recorder = Recorder(url, environment._client._limits)
        recorder.exchanges, recorder.sessions = [], []
        environment._client = recorder
        results = asyncio.run(SCENARIOS[name](environment))
        aggregated = asyncio.run(_aggregated(recorder))
    runner.should_exit = True
    fixture = {
        "server": name,
        "nemo_gym": version("nemo-gym"),
        "recorded_with": "tests/environments/record_gym_fixtures.py",
        "rows": rows,
        "exchanges": recorder.exchanges,
        "results": results,
        "aggregate_metrics": aggregated,
    }
    FIXTURES.mkdir(parents=True, exist_ok=True)
    path = FIXTURES / f"{name}.json"
    path.write_text(json.dumps(fixture, indent=1) + "\n", encoding="utf-8")
    print(f"{path}: {len(recorder.exchanges)} exchanges")  # noqa: T201 - a command


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the first tools of a long list, and those that its solution needs."""
    params = row["responses_create_params"]
    needed = json.dumps(row.get("ground_truth", []))
    tools = params.get("tools") or []
    kept = [tool for i, tool in enumerate(tools) if i < 5 or tool["name"] in needed]
    return {**row, "responses_create_params": {**params, **({"tools": kept} if tools else {})}}


async def _aggregated(recorder: Recorder) -> dict[str, Any]:
    """What the server makes of three rollouts of two tasks."""
    rewards = [(0, 0, 1.0), (0, 1, 0.0), (1, 0, 1.0)]
    body = {
        "verify_responses": [
            {"_ng_task_index": task, "_ng_rollout_index": rollout, "reward": reward, "words": "x"}
            for task, rollout, reward in rewards
        ]
    }
    before = len(recorder.exchanges)
    reply = await recorder.post("/aggregate_metrics", body, cookies={}, may_repeat=False)
    del recorder.exchanges[before:]
    return {"request": body, "answer": reply.json()}


if __name__ == "__main__":
    for server in SCENARIOS:
        record(server)
