"""Choosing tokens: the same with and without drafts, alone and in a batch, for all rules."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron3.errors import DataError
from nemotron3.inference.requests import FailureKind, SamplingParams
from nemotron3.inference.sampling.sampler import TokenChooser, choose, draft, token_logprobs
from nemotron3.inference.sampling.thinking_budget import BudgetIds, ThinkingBudget
from tests.inference.sampling.tables import table, write

VOCAB = 23
START, END, CALL, LINE, STOP = 0, 1, 2, 3, 4
IDS = BudgetIds(
    start=START,
    closing=(LINE, END),
    line_ends=frozenset({LINE, 9}),
    hidden=frozenset(),
    call_start=CALL,
    token_bytes=lambda token: b"\n" if token == LINE else b"so",
)


@dataclass
class Rhythm:
    """A constraint with memory: a token's remainder of 3 follows the position; ends on a beat."""

    position: int = 0
    fails_at: int | None = None

    def mask(self):
        if self.position == self.fails_at:
            raise DataError("out of step")
        allowed = torch.arange(VOCAB) % 3 == self.position % 3
        allowed[[START, END]] = True
        allowed[STOP] = self.position % 4 == 3
        return allowed

    def accept(self, token):  # noqa: ARG002
        self.position += 1

    def fork(self):
        return replace(self)


def chooser(params, *, index=0, seed=5, budget=None, constraint=None, prompt=(6, 7, 8)):
    return TokenChooser(
        params,
        prompt=prompt,
        seed=seed,
        index=index,
        stop_ids=frozenset({STOP}),
        vocab_size=VOCAB,
        budget=budget,
        constraint=constraint,
    )


params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_k=st.sampled_from([0, 4]),
    top_p=st.sampled_from([1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.1]),
    min_tokens=st.sampled_from([0, 3, 25]),
    presence_penalty=st.sampled_from([0.0, 0.6]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    logit_bias=st.sampled_from([{}, {5: 3.0, 9: -4.0}]),
)
budgets = st.none() | st.builds(
    lambda budget, grace, is_open: {"budget": budget, "grace": grace, "is_open": is_open},
    st.integers(0, 12),
    st.integers(0, 4),
    st.booleans(),
)


@settings(max_examples=60)
@given(
    requests=st.lists(st.tuples(params, budgets, st.booleans()), min_size=1, max_size=3),
    drafts=st.integers(1, 4),
    head=st.integers(0, 1),
    seed=st.integers(0, 2**63 - 1),
)
def test_speculation_and_company_change_nothing(requests, drafts, head, seed):
    def choosers():
        return [
            chooser(
                asked,
                index=i,
                seed=seed,
                budget=ThinkingBudget(**budget, ids=IDS) if budget else None,
                constraint=Rhythm() if constrained else None,
            )
            for i, (asked, budget, constrained) in enumerate(requests)
        ]

    alone = [write([one], 30, vocab=VOCAB)[0] for one in choosers()]
    assert write(choosers(), 30, vocab=VOCAB) == alone
    assert write(choosers(), 30, vocab=VOCAB, drafts=drafts, head=head) == alone


@pytest.mark.parametrize("limit", range(1, 9))
def test_looking_ahead_along_other_drafts_leaves_no_trace(limit):
    """An engine may drop drafts, or try drafts from another source."""

    def one():
        return chooser(
            SamplingParams(presence_penalty=0.5),
            budget=ThinkingBudget(budget=limit, grace=0, ids=IDS, is_open=True),
            constraint=Rhythm(),
        )

    plain = write([one()], 24, vocab=VOCAB)[0]
    tried, answer = one(), []
    while len(answer) < len(plain):
        here = len(answer)
        for window in ([], [END, LINE], [STOP], [7, 8]):
            draft([tried], table((*answer, *window), VOCAB, 1)[None], [window])
        window = plain[here : here + 2] if here % 2 else [*plain[here : here + 1], 9]
        rows = [table((*answer, *window[:i]), VOCAB, 0) for i in range(len(window) + 1)]
        answer += choose([tried], torch.stack(rows), [window])[0]
    assert answer[: len(plain)] == plain


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_head_that_knows_the_model_is_always_believed(temperature):
    """Drafts under the same noise, rules and budget are the choices: none is lost."""
    for constraint in (None, Rhythm()):
        one = chooser(
            SamplingParams(temperature=temperature, frequency_penalty=0.5, min_tokens=40),
            budget=ThinkingBudget(budget=5, grace=2, ids=IDS, is_open=True),
            constraint=constraint,
        )
        answer = []
        for _ in range(10):
            window = []
            for _ in range(3):
                window += draft([one], table((*answer, *window), VOCAB, 0)[None], [window])
            rows = [table((*answer, *window[:i]), VOCAB, 0) for i in range(4)]
            (new_tokens,) = choose([one], torch.stack(rows), [window])
            assert new_tokens[:3] == window
            assert len(new_tokens) == 4
            answer += new_tokens
        assert END in answer


def test_the_shared_noise_makes_similar_heads_agree():
    """Tokens per step with a draft head similar to the model, compared with an unrelated one."""

    def steps(distance):
        one, answer, count = chooser(SamplingParams(min_tokens=400)), [], 0
        while len(answer) < 400:
            near = table(answer, VOCAB, 0) + distance * table(answer, VOCAB, 1)
            (token,) = draft([one], near[None], [[]])
            rows = [table(answer, VOCAB, 0), table((*answer, token), VOCAB, 0)]
            answer += choose([one], torch.stack(rows), [[token]])[0]
            count += 1
        return count

    assert steps(0) == 200
    assert steps(0.1) < 230
    assert steps(100) > 330


def test_answers_differ_by_index_and_seed_and_by_nothing_else():
    def answer(**place):
        return write([chooser(SamplingParams(min_tokens=20), **place)], 20, vocab=VOCAB)[0]

    assert answer() == answer()
    answers = [answer(index=i, seed=s) for i in range(4) for s in range(4)]
    assert len({tuple(tokens) for tokens in answers}) == 16


@pytest.mark.parametrize("drafts", [0, 1, 2])
def test_answers_are_distributed_as_the_model_says(drafts):
    """Chi-square over all answers of three tokens from a model with memory."""
    vocab, count, seen = 3, 6000, {}
    choosers = [
        TokenChooser(
            SamplingParams(top_p=0.95, temperature=0.8),
            prompt=(),
            seed=11,
            index=index,
            stop_ids=frozenset(),
            vocab_size=vocab,
        )
        for index in range(count)
    ]
    for answer in write(choosers, 3, vocab=vocab, drafts=drafts, salt=3, head=4):
        seen[tuple(answer)] = seen.get(tuple(answer), 0) + 1
    chi_square, cells = 0.0, 0
    for a in range(vocab):
        for b in range(vocab):
            for c in range(vocab):
                probability = 1.0
                for history, token in (((), a), ((a,), b), ((a, b), c)):
                    row = (table(history, vocab, 3).double() / 0.8).softmax(-1)
                    above = row[row > row[token]].sum()
                    total = sum(p for p in row if row[row > p].sum() < 0.95)
                    probability *= float(row[token] / total) if above < 0.95 else 0.0
                expected, found = count * probability, seen.get((a, b, c), 0)
                if expected == 0:
                    assert found == 0
                elif expected >= 5:
                    chi_square += (found - expected) ** 2 / expected
                    cells += 1
    assert cells > 5
    assert chi_square < cells + 3.1 * math.sqrt(2 * cells) + 5  # about one seed in a thousand


def test_min_tokens_keeps_the_end_back_and_a_stop_ends_the_window():
    logits = torch.zeros(VOCAB)
    logits[STOP] = 9
    one = chooser(SamplingParams(temperature=0, min_tokens=2))
    assert choose([one], logits.expand(3, -1), [[0, 0]]) == [[0, 0, STOP]]
    assert one.num_tokens == 3
    one = chooser(SamplingParams(temperature=0))
    assert choose([one], logits.expand(3, -1), [[STOP, 5]]) == [[STOP]]


def test_what_is_forced_is_known_ahead():
    one = chooser(SamplingParams(), budget=ThinkingBudget(budget=1, grace=0, ids=IDS, is_open=True))
    assert one.budget is not None
    assert one.budget.forced() is None
    logits = torch.zeros(1, VOCAB)
    logits[0, 8] = 99
    assert choose([one], logits, [[]]) == [[8]]
    assert one.budget.forced() == LINE
    assert draft([one], logits, [[]]) == [LINE]
    assert draft([one], logits, [[LINE]]) == [END]
    assert choose([one], logits.expand(3, -1), [[LINE, END]]) == [[LINE, END, 8]]
    assert one.budget.forced() is None
    assert not one.budget.is_open


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_answer_fails_alone(temperature):
    sound = SamplingParams(temperature=temperature)
    logits = torch.zeros(5, VOCAB)
    logits[1, 3] = torch.nan
    logits[3:] = -torch.inf
    logits[3, 7] = 0
    three = [chooser(sound) for _ in range(3)]
    first, second, third = choose(three, logits, [[], [5], [7]])
    assert len(first) == 1
    assert second == []
    assert third == [7]
    assert [one.error for one in three] == [None, three[1].error, None]
    assert "logits are NaN" in (three[1].error or "")
    assert [one.failure for one in three] == [None, FailureKind.ENGINE, None]
    assert draft([three[1]], logits[1:2], [[]]) == [0]


def test_a_constraint_that_fails_is_reported_where_plain_decoding_meets_it():
    for drafts in (0, 3):
        one, answer = chooser(SamplingParams(), constraint=Rhythm(fails_at=2)), []
        while one.error is None:
            window = []
            for _ in range(drafts):
                window += draft([one], table((*answer, *window), VOCAB, 0)[None], [window])
            rows = [table((*answer, *window[:i]), VOCAB, 0) for i in range(drafts + 1)]
            answer += choose([one], torch.stack(rows), [window])[0]
        assert (one.error, one.failure) == ("out of step", FailureKind.GRAMMAR)
        assert len(answer) == 2


@dataclass
class Trap:
    """A constraint that fails once token 5 has come."""

    is_shut: bool = False

    def mask(self):
        if self.is_shut:
            raise DataError("trapped")

    def accept(self, token):
        self.is_shut |= token == 5

    def fork(self):
        return replace(self)


def test_what_fails_along_a_draft_that_is_not_chosen_does_not_count():
    logits = torch.zeros(3, VOCAB)
    logits[:, 8] = 9
    one = chooser(SamplingParams(temperature=0), constraint=Trap())
    assert draft([one], logits[:1], [[5]])[0] in range(VOCAB)
    assert choose([one], logits, [[5, 8]]) == [[8]]
    assert one.error is None
    assert choose([one], logits, [[8, 8]]) == [[8, 8, 8]]


@given(
    st.lists(st.lists(st.integers(-9, 9), min_size=5, max_size=5), min_size=1), st.integers(0, 9)
)
def test_logprobs_are_the_models_own(values, top):
    logits = torch.tensor(values) / 4
    picked = [row % 5 for row in range(len(values))]
    for row, token, found in zip(values, picked, token_logprobs(logits, picked, top), strict=True):
        total = math.log(sum(math.exp(value / 4) for value in row))
        assert found.token == token
        assert found.logprob == pytest.approx(row[token] / 4 - total, abs=1e-5)
        assert found.rank == sum(value >= row[token] for value in row)
        best = [value / 4 - total for value in sorted(row, reverse=True)[:top]]
        assert [value for _, value in found.top] == pytest.approx(best, abs=1e-5)
        for other, value in found.top:
            assert value == pytest.approx(row[other] / 4 - total, abs=1e-5)
