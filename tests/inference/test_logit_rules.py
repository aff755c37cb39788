"""Bias, penalties and minimum length against loops over tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron3.errors import ConfigError
from nemotron3.inference.logit_rules import LogitRules
from nemotron3.inference.requests import SamplingParams

VOCAB = 7
tokens = st.lists(st.integers(0, VOCAB - 1), max_size=6)


def reference(row, params, prompt, answer, stop_ids):
    row = list(row)
    for token in range(VOCAB):
        row[token] += params.logit_bias.get(token, 0)
        if token in prompt or token in answer:
            by = params.repetition_penalty
            row[token] = row[token] / by if row[token] > 0 else row[token] * by
        row[token] -= params.frequency_penalty * answer.count(token)
        row[token] -= params.presence_penalty * (token in answer)
        if token in stop_ids and len(answer) < params.min_tokens:
            row[token] = -torch.inf
    return row


@given(
    params=st.builds(
        SamplingParams,
        min_tokens=st.integers(0, 6),
        presence_penalty=st.sampled_from([0.0, 0.5, -2.0]),
        frequency_penalty=st.sampled_from([0.0, 0.25, -1.0]),
        repetition_penalty=st.sampled_from([1.0, 1.5, 0.5]),
        logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, 1.5])),
    ),
    row=st.lists(st.integers(-8, 8), min_size=VOCAB, max_size=VOCAB),
    prompt=tokens,
    answer=tokens,
    drafts=tokens,
    stop_ids=st.frozensets(st.integers(0, VOCAB - 1)),
)
def test_a_row_is_changed_as_the_definitions_say(params, row, prompt, answer, drafts, stop_ids):
    rules = LogitRules(params, prompt=prompt, stop_ids=stop_ids, vocab_size=VOCAB)
    for token in answer:
        rules.accept(token)
    given_row = torch.tensor(row, dtype=torch.float32)
    position = len(answer) + len(drafts)
    changed = rules.apply(given_row, position=position, drafts=drafts, mask=None)
    expected = torch.tensor(reference(row, params, prompt, [*answer, *drafts], stop_ids))
    torch.testing.assert_close(changed, expected.float())
    assert given_row.tolist() == row, "what the model gave is left alone: logprobs are read from it"
    if not rules.apply_at(position):
        assert changed.equal(given_row)


def test_a_constraint_outranks_the_minimum():
    rules = LogitRules(
        SamplingParams(min_tokens=5), prompt=(), stop_ids=frozenset({1}), vocab_size=3
    )
    only_the_end = torch.tensor([False, True, False])
    row = rules.apply(torch.zeros(3), position=2, drafts=(), mask=only_the_end)
    assert row.tolist() == [-torch.inf, 0, -torch.inf]
    more = torch.tensor([True, True, False])
    row = rules.apply(torch.zeros(3), position=2, drafts=(), mask=more)
    assert row.tolist() == [0, -torch.inf, -torch.inf]


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_tokens_that_do_not_exist_are_named(token):
    with pytest.raises(ConfigError, match=rf"logit_bias has token {token}; .* 0 to 6"):
        LogitRules(
            SamplingParams(logit_bias={token: 1}), prompt=(), stop_ids=frozenset(), vocab_size=VOCAB
        )
    with pytest.raises(ConfigError, match=f"stop_token_ids has token {token}"):
        LogitRules(SamplingParams(), prompt=(), stop_ids=frozenset({token}), vocab_size=VOCAB)
