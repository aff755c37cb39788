"""Weights that change in the middle of rollouts: every token is scored by those that it names."""

from itertools import accumulate, groupby, product

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from nemotron3 import LLM, EngineConfig
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.rl.batches import policy_batches
from nemotron3.rl.rollouts import RolloutConfig, RolloutDriver
from nemotron3.text import CHAT_STYLES, ChatTemplate, Tokenizer
from tests.rl.playground import Chatter, Parity, save_policy
from tests.tiny import randomized

VERSIONS = 4
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = save_policy(tmp_path_factory.mktemp("policy"))
    every = [randomized(LanguageModel.from_pretrained(folder), seed) for seed in range(VERSIONS)]
    return every, Tokenizer.from_directory(folder)


def scored(logits, ids, positions):
    """Log-probabilities of the tokens at `positions`, by the logits of those before them."""
    at = torch.tensor(positions)
    return logits[at - 1].log_softmax(-1).gather(-1, torch.tensor(ids)[at, None])[:, 0]


@torch.no_grad()
def recomputed(models, rollout):
    """By one forward pass with the weights that each token names."""
    expected = {}
    for version in rollout.versions:
        logits = models[version](torch.tensor([rollout.ids]))[0]
        for turn in rollout.turns:
            own = [p for p in range(turn.start, turn.end) if rollout.weight_versions[p] == version]
            if own:
                found = scored(logits, rollout.ids, own)
                expected |= dict(zip(own, found.tolist(), strict=True))
    return expected


@torch.no_grad()
def carried(models, rollout):
    """The same, where each turn goes on from the states that earlier weights have computed."""
    expected = {}
    for turn in rollout.turns:
        own = list(range(turn.start, turn.end))
        given = torch.tensor([rollout.logprobs[position] for position in own])
        for readers in possible_readers(rollout, turn):
            found = scored(read_by(models, rollout.ids, readers), rollout.ids, own)
            if (found - given).abs().max() < TOLERANCE:
                break
        expected |= dict(zip(own, found.tolist(), strict=True))
    return expected


def possible_readers(rollout, turn):
    """The version that read each token of a turn: the one that sampled the next token.

    A prompt is read by the weights of the first token, unless they came between two of its chunks:
    a rollout does not tell where these end.
    """
    versions = rollout.weight_versions
    first, rest = versions[turn.start], versions[turn.start + 1 : turn.end]
    yield [first] * turn.start + rest
    if rollout.continues_old_states:
        for earlier, count in product(range(first), range(1, turn.start)):
            yield [earlier] * count + [first] * (turn.start - count) + rest


def read_by(models, ids, readers):
    """Logits of a forward pass that carries the state from each version to the next."""
    state, parts, at = models[readers[0]].new_state(slots=1), [], 0
    for version, same in groupby(readers):
        count = len(list(same))
        parts.append(models[version](torch.tensor([ids[at : at + count]]), state=state)[0])
        at += count
    return torch.cat(parts)


@pytest.mark.slow
# A failure is not shrunk: how many drafts are made follows the clock, so examples do not repeat.
@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    running=st.sampled_from(["recompute", "keep"]),
    # Far enough apart that not more than one comes while a prompt is read.
    gaps=st.lists(st.integers(6, 40), min_size=1, max_size=VERSIONS - 1),
    seed=st.integers(0, 10**6),
    engine=st.sampled_from(
        [
            {"max_num_seqs": 3},
            {"max_num_seqs": 8, "max_draft_tokens": 0},
            {"max_num_seqs": 8, "max_draft_tokens": 3, "adapts_drafts": False},
        ]
    ),
    budget=st.sampled_from([None, 3]),
)
# After the first step, when a prompt's state is computed and no answer to it has begun.
@example(running="keep", gaps=[2, 10], seed=0, engine={"max_num_seqs": 3}, budget=3)
def test_updates_in_flight_leave_no_mismatch(models, running, gaps, seed, engine, budget):
    every, tokenizer = models
    model = LanguageModel.from_config(every[0].config)
    model.load_state_dict(every[0].state_dict())
    llm = LLM(
        model, tokenizer=tokenizer, config=EngineConfig(max_model_len=256, page_size=8, **engine)
    )
    left, calls = list(accumulate(gaps)), 0

    def on_step():
        nonlocal calls
        calls += 1
        while left and calls >= left[0]:
            left.pop(0)
            version = llm.weight_version + 1
            llm.update_weights(every[version].state_dict(), running=running)

    environments = {e.name: e for e in (Parity(), Chatter())}
    driver = RolloutDriver(
        llm,
        tokenizer,
        ChatTemplate(CHAT_STYLES["nano"]),
        environments,
        RolloutConfig(max_tokens=12, max_context=200, reasoning_budget=budget),
        on_step=on_step,
    )
    rows = [environment.task(n) for environment in environments.values() for n in range(2)]
    rollouts = driver.play(rows, group_size=2, seed=seed)
    for rollout in rollouts:
        expected = (recomputed if running == "recompute" else carried)(every, rollout)
        assert len(expected) == rollout.num_sampled
        for position, logprob in expected.items():
            assert abs(rollout.logprobs[position] - logprob) < TOLERANCE, (position, rollout)
        if not rollout.continues_old_states:
            plain = recomputed(every, rollout)
            assert all(abs(rollout.logprobs[p] - plain[p]) < TOLERANCE for p in plain)
        assert running == "keep" or not rollout.continues_old_states
    newest = llm.weight_version
    batches = policy_batches(rollouts, [1.0] * len(rollouts), max_tokens=10**4, version=newest)
    current = sum(int(batch.current.sum()) for batch in batches)
    assert current == sum(
        version == newest and is_sampled
        for rollout in rollouts
        if not rollout.continues_old_states
        for version, is_sampled in zip(rollout.weight_versions, rollout.is_sampled, strict=True)
    )
