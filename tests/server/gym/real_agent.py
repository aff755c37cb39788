"""NeMo Gym's own agent and model server, between our model's server and our environment's server.

In the environment of `tests/environments/record_gym_fixtures.py`, with both servers running
(`nemotron3 serve MODEL --served-model-name policy`, `nemotron3 env serve NAME`):

    python -m tests.server.gym.real_agent http://127.0.0.1:8000 http://127.0.0.1:8001 rows.jsonl

Prints the reward of each row, after asserting what NeMo RL asserts of a rollout's token ids.
"""

import asyncio
import json
import sys
import threading
import time
from pathlib import Path
from unittest.mock import MagicMock

import aiohttp
import uvicorn
from nemo_gym.config_types import ModelServerRef, ResourcesServerRef
from nemo_gym.server_utils import ServerClient
from pydantic import BaseModel
from responses_api_agents.simple_agent.app import SimpleAgent, SimpleAgentConfig
from responses_api_models.vllm_model.app import VLLMModel, VLLMModelConfig


class Urls(dict):
    """Addresses by the names of servers, in the place of NeMo Gym's head server."""

    async def post(self, server_name, url_path, json=None, cookies=None, **_):
        """Send a request as NeMo Gym's client does: without a jar of cookies."""
        body = json.model_dump(exclude_unset=True) if isinstance(json, BaseModel) else json
        async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:
            url = self[server_name] + url_path
            answer = await session.post(url, json=body, cookies=cookies)
            await answer.read()
            return answer


def serve(web) -> str:
    """Serve one of NeMo Gym's applications; its address."""
    runner = uvicorn.Server(uvicorn.Config(web, port=0, log_level="warning"))
    threading.Thread(target=runner.run, daemon=True).start()
    while not runner.started:
        time.sleep(0.01)
    return f"http://127.0.0.1:{runner.servers[0].sockets[0].getsockname()[1]}"


async def play(urls: Urls, row: dict) -> str:
    """One row, played and verified."""
    answer = await urls.post("agent", "/run", json=row)
    text = await answer.text()
    assert answer.status == 200, text
    result, seen, turns = json.loads(text), [], 0
    for item in result["response"]["output"]:
        if "prompt_token_ids" in item:
            assert item["prompt_token_ids"][: len(seen)] == seen, "ids do not continue"
            assert len(item["generation_token_ids"]) == len(item["generation_log_probs"])
            seen = item["prompt_token_ids"] + item["generation_token_ids"]
            turns += 1
    assert turns, "no turn has ids"
    return f"reward {result['reward']}, {turns} turns, {len(seen)} tokens"


def main() -> None:
    """Read the command line; the rest of it is NeMo Gym's, which reads it too."""
    policy, environment, rows = sys.argv[1:4]
    del sys.argv[1:]
    urls = Urls(resources=environment)
    client = MagicMock(spec=ServerClient)
    client.post = urls.post
    common = {"host": "127.0.0.1", "port": 0, "entrypoint": "app.py"}
    model = VLLMModelConfig(
        **common, name="model", base_url=f"{policy}/v1", api_key="none", model="policy",
        return_token_id_information=True, uses_reasoning_parser=True,
    )  # fmt: skip
    urls["model"] = serve(VLLMModel(config=model, server_client=client).setup_webserver())
    agent = SimpleAgentConfig(
        **common, name="agent", max_steps=8,
        resources_server=ResourcesServerRef(type="resources_servers", name="resources"),
        model_server=ModelServerRef(type="responses_api_models", name="model"),
    )  # fmt: skip
    urls["agent"] = serve(SimpleAgent(config=agent, server_client=client).setup_webserver())
    for line in Path(rows).read_text("utf-8").splitlines():
        print(asyncio.run(play(urls, json.loads(line))))  # noqa: T201 - a command


if __name__ == "__main__":
    main()
