"""Tasks split among engines: who plays what, and that nobody can tell from the rollouts."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron3 import LLM, EngineConfig
from nemotron3.errors import ConfigError
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.rl.data_parallel import EnginesConfig, shares
from nemotron3.rl.rollouts import RolloutConfig, RolloutDriver
from nemotron3.text import CHAT_STYLES, ChatTemplate, Tokenizer
from tests.rl.playground import Chatter, Failing, OtherParity, Parity, save_policy
from tests.tiny import randomized


def row(environment):
    return {"responses_create_params": {"input": []}, "agent_ref": {"name": environment}}


@given(st.lists(st.sampled_from("abc"), max_size=40), st.integers(1, 6))
def test_every_task_has_one_engine_and_every_engine_as_much_to_do(names, num_engines):
    dealt = shares([row(name) for name in names], num_engines)
    assert len(dealt) == num_engines
    assert sorted(place for own in dealt for place in own) == list(range(len(names)))
    assert all(own == sorted(own) for own in dealt)
    sizes = [len(own) for own in dealt]
    assert max(sizes) - min(sizes) <= 1
    for name in set(names):
        own = [Counter(names[place] for place in own)[name] for own in dealt]
        assert max(own) - min(own) <= 1


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """One engine, which has room for a part of the rollouts at a time."""
    folder = save_policy(tmp_path_factory.mktemp("policy"))
    tokenizer = Tokenizer.from_directory(folder)
    llm = LLM(
        randomized(LanguageModel.from_pretrained(folder)),
        tokenizer=tokenizer,
        config=EngineConfig(max_num_seqs=5, max_model_len=256),
    )
    environments = [Parity(), OtherParity(), Chatter(), Failing(where="step", times=10**6)]
    config = RolloutConfig(max_tokens=12, max_context=200)
    by_name = {environment.name: environment for environment in environments}
    return RolloutDriver(llm, tokenizer, ChatTemplate(CHAT_STYLES["super"]), by_name, config)


@pytest.mark.parametrize(("num_rows", "num_engines"), [(7, 2), (7, 3), (2, 3), (1, 2)])
def test_groups_seeds_and_efforts_are_those_of_the_whole_list(driver, num_rows, num_engines):
    """So the rollouts are the same, to the rounding of other batches."""
    every = list(driver._environments.values())
    rows = [every[n % len(every)].task(n) for n in range(num_rows)]
    how = {"group_size": 2, "seed": 5, "effort_fraction": 0.5}
    whole = driver.play(rows, **how)
    parts = []
    for places in shares(rows, num_engines):
        parts += driver.play([rows[place] for place in places], places=places, **how)
    parts.sort(key=lambda rollout: rollout.group)
    assert [rollout.group for rollout in whole] == [n for n in range(num_rows) for _ in range(2)]
    for ours, theirs in zip(parts, whole, strict=True):
        for name in ("row", "group", "ids", "effort", "reward", "attempts", "is_cut"):
            assert getattr(ours, name) == getattr(theirs, name), name
        torch.testing.assert_close(
            torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("name", ["num_processes", "max_restarts"])
def test_settings_are_checked(name):
    with pytest.raises(ConfigError, match=rf"engines\.{name} is -1; it must be 0 or more"):
        EnginesConfig(**{name: -1})
