"""Rollouts in an environment on another server: those of this process, and failures on the way."""

import json

import pytest

from nemotron3.environments import load_environment
from nemotron3.environments.gym_protocol import gym_row
from nemotron3.environments.gym_server import GymServerEnvironment
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.rl.rollouts import failure_of
from nemotron3.text import Tokenizer
from tests.environments.fake_gym import Answer, fake_server
from tests.environments.gym_scenarios import LIMITS
from tests.rl.playground import Parity, save_policy
from tests.rl.test_rollouts import driver_for
from tests.server.gym.serving import serving
from tests.tiny import randomized


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = save_policy(tmp_path_factory.mktemp("policy"))
    return randomized(LanguageModel.from_pretrained(folder)), Tokenizer.from_directory(folder)


def write_rows(folder, environment, count):
    """Rows of training and held-out tasks in two files."""
    for split in ("train", "held_out"):
        rows = [gym_row(environment.task(index, split=split)) for index in range(count)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / split).write_text(text, encoding="utf-8")
    return folder / "train", folder / "held_out"


def test_a_server_s_environment_is_played_as_ours(policy, tmp_path):
    environment = Parity()
    rows, held_out = write_rows(tmp_path, environment, 4)
    with serving(environment) as (url, server):
        remote = load_environment(f"{rows}@{url}?held_out={held_out}&max_turns=1")
        played = driver_for(policy, remote).play(
            [remote.task(index) for index in range(4)], group_size=3, seed=1
        )
        assert len(server.sessions) == 12
    direct = driver_for(policy, environment).play(
        [environment.task(index) for index in range(4)], group_size=3, seed=1
    )
    assert [rollout.ids for rollout in played] == [rollout.ids for rollout in direct]
    assert [rollout.reward for rollout in played] == [rollout.reward for rollout in direct]
    assert {rollout.reward for rollout in direct} == {0.0, 1.0}
    assert {rollout.environment for rollout in played} == {"parity"}


def test_a_server_that_fails_costs_the_rollouts_that_it_failed_and_no_others(policy, tmp_path):
    rows, held_out = write_rows(tmp_path, Parity(), 2)
    judged = []

    def respond(request):
        if request.path == "/seed_session":
            return Answer({})
        judged.append(request.body["number"])
        is_bad = request.body["number"] == broken or len(judged) == 1
        return Answer("no judge", 500) if is_bad else Answer({"reward": 1.0})

    with fake_server(respond) as url:
        remote = GymServerEnvironment(url, rows, held_out=held_out, max_turns=1, limits=LIMITS)
        tasks = [remote.task(index) for index in range(2)]
        broken = tasks[1]["number"]
        played = driver_for(policy, remote, max_attempts=2).play(tasks, group_size=2)
    assert [rollout.reward for rollout in played] == [1.0, 1.0, None, None]
    assert [rollout.attempts for rollout in played] == [1, 1, 2, 2]
    assert failure_of(played[2]).kind == "judge_failed"
    assert "500: no judge" in failure_of(played[2]).message
