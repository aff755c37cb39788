"""A whole rollout over HTTP: our server as the policy, an environment of ours as resources server.

The loop is that of NeMo Gym's simple agent (`/run`): seed a session, let the policy answer, send
its calls to the tools, and have the whole verified.
"""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nemotron3.environments import TaskResponse, prompt_of, tools_of
from nemotron3.environments.calculator import Calculator
from nemotron3.environments.gym_protocol import gym_row
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.text import ChatTemplate, Tokenizer
from tests.server.gym.serving import post, serving
from tests.server.learned import loss_of
from tests.server.serving import MODEL, running
from tests.tiny import tiny_config

ENVIRONMENT = Calculator(difficulty=0.0)
MAX_STEPS = 6


@pytest.fixture(scope="module")
def row():
    return gym_row(ENVIRONMENT.task(0, split="held_out"))


@pytest.fixture(scope="module")
def policy(row, tmp_path_factory):
    """A server of a model that has learned the solution of the row by heart."""
    response = asyncio.run(ENVIRONMENT.demonstration(row))
    template = ChatTemplate()
    rendered = template.render(
        [*prompt_of(row), *response.messages],
        tools=tools_of(row),
        add_generation_prompt=False,
        truncate_history_thinking=False,
    )
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = Tokenizer.train([rendered.text * 9], vocab_size=500)
    tokenizer.chat_template = template.to_jinja()
    tokenizer.save(folder)
    torch.manual_seed(0)
    config = tiny_config("MEM*E", vocab_size=tokenizer.vocab_size, max_position_embeddings=2048)
    model = LanguageModel.from_config(config)
    tokens = rendered.tokens(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(400):
        loss = loss_of(model, tokens.ids, tokens.loss_mask)
        if loss < 0.01:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05, "the solution was not learned"
    model.save_pretrained(folder)
    with running(folder) as server:
        yield server


def run(policy, url, row, **options):
    """NeMo Gym's `/run`: the row, played and verified."""
    seeded = post(url, "/seed_session", row)
    assert seeded.status_code == 200, seeded.text
    cookies = dict(seeded.cookies)
    params, outputs = row["responses_create_params"], []
    response = {}
    for _ in range(MAX_STEPS):
        body = {**params, "input": [*params["input"], *outputs], "model": MODEL, **options}
        answer = policy.post("/v1/responses", body)
        assert answer.status_code == 200, answer.text
        response = answer.json()
        outputs += response["output"]
        calls = [item for item in response["output"] if item["type"] == "function_call"]
        if response["incomplete_details"] or not calls:
            break
        for call in calls:
            said = post(url, f"/{call['name']}", json.loads(call["arguments"]), cookies=cookies)
            cookies = dict(said.cookies)  # those of the last answer, and no others
            outputs.append(
                {"type": "function_call_output", "call_id": call["call_id"], "output": said.text}
            )
    verified = post(
        url, "/verify", {**row, "response": {**response, "output": outputs}}, cookies=cookies
    )
    assert verified.status_code == 200, verified.text
    return verified.json()


def test_an_agent_is_rewarded_for_a_rollout_and_keeps_its_tokens(policy, row):
    with serving(ENVIRONMENT) as (url, server):
        options = {"temperature": 0.0, "return_token_ids": True, "store": False}
        verified = run(policy, url, row, **options)
        assert verified["reward"] == 1.0
        assert verified["reward_components"]["calculated"] == 1.0
        assert len(server.sessions) == 1
        cut = run(policy, url, row, **options, max_output_tokens=3)
        assert cut["reward"] == 0.0
    turns = [item for item in verified["response"]["output"] if "prompt_token_ids" in item]
    assert len(turns) == len(ENVIRONMENT.solve(row))
    seen = []
    for turn in turns:  # NeMo RL's assertion on what Gym returns
        assert turn["prompt_token_ids"][: len(seen)] == seen
        seen = turn["prompt_token_ids"] + turn["generation_token_ids"]
    played = TaskResponse.from_gym(verified["response"])
    assert [call.name for call in played.tool_calls] == ["calculate"]
    assert played.answer == row["expected_answer"]


def test_rollouts_of_several_agents_at_once_are_apart(policy, row):
    with serving(ENVIRONMENT) as (url, server), ThreadPoolExecutor(4) as threads:
        options = {"temperature": 0.0, "return_token_ids": True}
        found = [threads.submit(run, policy, url, row, **options) for _ in range(8)]
        assert [each.result()["reward"] for each in found] == [1.0] * 8
        assert len(server.sessions) == 8
