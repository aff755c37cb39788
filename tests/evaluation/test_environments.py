"""Held-out tasks played by a model, and what is counted of them."""

import json
from dataclasses import replace

import pytest

from nemotron3.config import to_record
from nemotron3.environments.registry import load_environment
from nemotron3.errors import ConfigError, DataError
from nemotron3.evaluation.environments import (
    environments_by_name,
    held_out_tasks,
    play_tasks,
    results_by_environment,
)
from nemotron3.evaluation.statistics import wilson_interval
from nemotron3.inference.config import EngineConfig
from nemotron3.inference.llm import LLM
from nemotron3.rl.records import RolloutRecord, means_by_environment, read_records
from nemotron3.rl.rollouts import RolloutConfig, RolloutDriver
from nemotron3.text import CHAT_STYLES, ChatTemplate, Tokenizer
from tests.rl.playground import Failing, Parity, save_policy


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy") / "model")


def driver_of(policy, environment, **changes):
    config = RolloutConfig(max_tokens=8, max_context=96, enable_thinking=False, **changes)
    llm = LLM(policy, config=EngineConfig(max_num_seqs=8, max_model_len=96, max_draft_tokens=0))
    tokenizer = Tokenizer.from_directory(policy)
    template = ChatTemplate(CHAT_STYLES["nano"])
    return RolloutDriver(llm, tokenizer, template, {environment.name: environment}, config)


def task(n, reward, answer="a", environment="made", **labels):
    return RolloutRecord(
        when="now",
        environment=environment,
        group=n,
        prompt=f"task {n}",
        messages=({"role": "user", "content": f"task {n}"},),
        components={},
        reward=reward,
        failure=None if reward is not None else "judge_failed: away",
        tokens=10 + n,
        is_cut=n == 0,
        answer=answer,
        labels=labels,
    )


def test_the_same_seed_gives_the_same_tasks_and_rewards(policy):
    environment = Parity()
    tasks = held_out_tasks(environment, 12, seed=3)
    played = play_tasks(driver_of(policy, environment), tasks, when="now", seed=3)
    again = play_tasks(
        driver_of(policy, environment), held_out_tasks(environment, 12, seed=3), when="now", seed=3
    )
    assert played == again
    assert len({each.prompt for each in played}) == 12
    other = held_out_tasks(environment, 12, seed=4)
    assert {each["number"] for each in other} != {each["number"] for each in tasks}
    # What the verifier read is the answer, and its parity the reward.
    assert all(each.reward == (len(each.answer) % 2 == 0) for each in played)
    assert all(0 < each.tokens <= 8 for each in played)


def test_greedy_answers_do_not_follow_the_seed(policy):
    environment = Parity()
    tasks = held_out_tasks(environment, 6)
    greedy = [
        play_tasks(driver_of(policy, environment, temperature=0.0), tasks, when="now", seed=seed)
        for seed in (1, 2)
    ]
    assert greedy[0] == greedy[1]
    sampled = [
        play_tasks(driver_of(policy, environment), tasks, when="now", seed=seed) for seed in (1, 2)
    ]
    assert sampled[0] != sampled[1]


def test_labels_are_those_of_row_and_verifier(policy):
    environment = load_environment("lookup", difficulty=0.0)
    tasks = held_out_tasks(environment, 20)
    played = play_tasks(driver_of(policy, environment), tasks, when="now")
    assert [each.labels["is_answerable"] for each in played] == [
        "yes" if row["is_answerable"] else "no" for row in tasks
    ]
    assert [each.labels["expected_answer"] for each in played] == [
        row["expected_answer"] for row in tasks
    ]


def test_what_failed_is_counted_and_in_no_mean(policy):
    environment = Failing(where="verify", times=10**6)
    played = play_tasks(driver_of(policy, environment), held_out_tasks(environment, 5), when="now")
    found = results_by_environment(played)["failing"]
    assert (found.num_tasks, found.num_failures, found.reward) == (5, 5, None)
    assert found.share_perfect == 0


def test_counts_by_hand():
    played = [
        task(0, 1.0, "B", expected_answer="B", is_answerable="yes"),
        task(1, 0.0, "B", expected_answer="A", is_answerable="yes"),
        task(2, 0.0, "B", expected_answer="C", is_answerable="no"),
        task(3, 1.0, "A", expected_answer="A", is_answerable="yes"),
        task(4, None, "", expected_answer="B"),
    ]
    found = results_by_environment(played)["made"]
    assert found.num_tasks == 5
    assert found.num_failures == 1
    assert found.reward.n == 4
    assert found.reward.mean == 0.5
    assert found.reward.interval == wilson_interval(2, 4)
    assert found.share_perfect == 0.5
    assert found.tokens == 12
    assert found.share_cut == 0.2
    assert (found.top_answer, found.top_answer_share) == ("B", 0.75)
    assert found.top_answer_is_right == 0.25
    by_answer = {v: (m.n, m.mean) for v, m in found.by_label["expected_answer"].items()}
    assert by_answer == {"A": (2, 0.5), "B": (1, 1.0), "C": (1, 0.0)}
    assert {v: m.n for v, m in found.by_label["is_answerable"].items()} == {"no": 1, "yes": 3}


def test_graded_rewards_have_a_bootstrap_interval():
    played = [task(n, n / 10) for n in range(11)]
    found = results_by_environment(played)["made"]
    assert found.reward.mean == pytest.approx(0.5)
    assert 0.2 < found.reward.interval.low < 0.5 < found.reward.interval.high < 0.8
    assert found.share_perfect == pytest.approx(1 / 11)
    assert found.top_answer_is_right is None


def test_rewards_by_true_answer_need_few_answers():
    many = [task(n, 1.0, expected_answer=str(n)) for n in range(13)]
    assert results_by_environment(many)["made"].by_label == {}
    alike = [task(n, 1.0, expected_answer="1") for n in range(3)]
    assert results_by_environment(alike)["made"].by_label == {}


def test_means_are_of_environments():
    played = [task(0, 1.0), task(1, 0.0), task(2, 1.0, environment="other"), task(3, None)]
    assert means_by_environment(played, lambda each: each.reward) == {
        "all": 0.75,
        "made": 0.5,
        "other": 1.0,
    }


def test_records_of_a_moment_are_read_from_a_file(tmp_path):
    records = [task(0, 1.0, is_harmful="no"), replace(task(1, None), when="later")]
    file = tmp_path / "rollouts.jsonl"
    lines = [json.dumps(to_record(record)) + "\n" for record in records]
    file.write_text("".join([*lines, lines[1][:40]]))
    assert read_records(file, when="now") == records[:1]
    assert read_records(file, when="later") == records[1:]
    file.write_text(lines[0] + '{"when": "now"}\n')
    with pytest.raises(DataError, match="line 2 is no rollout of this version"):
        read_records(file, when="now")


def test_two_of_a_name_and_too_few_tasks_are_refused():
    with pytest.raises(ConfigError, match="two environments named 'parity'"):
        environments_by_name([Parity(), Parity()])

    class Few(Parity):
        name = "few"

        def draw(self, random):
            return self.row(f"say {random.randrange(40)}")

    with pytest.raises(DataError, match="30 are wanted"):
        held_out_tasks(Few(), 30)
