"""The engine, compared with the simplest loop: a forward pass of the whole sequence per token."""

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron3.errors import ConfigError, DataError
from nemotron3.inference.config import EngineConfig
from nemotron3.inference.engine import Engine
from nemotron3.inference.engine.memory import page_bytes
from nemotron3.inference.requests import FailureKind, FinishReason, SamplingParams
from nemotron3.inference.sequences import EngineRequest
from nemotron3.models.cache.state_precision import StatePrecision
from tests.tiny import randomized, tiny_config, tiny_model, tokens_for
from tests.tolerances import DECODE

CONFIG = tiny_config("MEM*E/*E/*E", eos_token_id=2)
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def model():
    return tiny_model(CONFIG)


def engine_for(model, **changes):
    small = {"max_num_seqs": 4, "page_size": 4, "prefix_interval": 8, "max_model_len": 96}
    return Engine(model, EngineConfig(**(small | changes)))


def request(name, prompt, params=GREEDY, **more):
    return EngineRequest(request_id=name, prompt=tuple(prompt), params=params, **more)


def run(engine, requests, *, at=None, scored=False):
    """Answers by (request, index), or their log-probabilities; `at` says when a request arrives."""
    at = at or {}
    answers, step = {}, 0
    waiting = list(requests)
    while waiting or engine.has_work:
        for arriving in [r for r in waiting if at.get(r.request_id, 0) <= step]:
            engine.add(arriving)
            waiting.remove(arriving)
        for delta in engine.step():
            answer = answers.setdefault((delta.request_id, delta.index), [])
            answer += [p.logprob for p in delta.logprobs] if scored else delta.tokens
        step += 1
        assert step < 2000, "the engine makes no progress"
    return answers


@torch.no_grad()
def greedy(model, prompt, count, bias=()):
    tokens = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([tokens]))[0, -1]
        logits[list(bias)] += 100.0
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


PAGE = 2 * 4 * (2 * 2 * 20) * 4
"""Bytes of a page of four tokens in the attention layers of model and draft block."""
PROMPTS = [tokens_for(CONFIG, n, seed=n).tolist() for n in (1, 3, 9, 17, 30, 8, 41, 2)]


@pytest.fixture(scope="module")
def expected(model):
    return [greedy(model, prompt, 12) for prompt in PROMPTS]


OF_TWO = (7, 9)
"""With a choice of two tokens, half of the drafts of a model that was never trained stand."""


@pytest.fixture(scope="module")
def expected_of_two(model):
    return [greedy(model, prompt, 12, OF_TWO) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def expected_after(model, expected_of_two):
    """The expected continuation of an answer."""
    return [
        greedy(model, [*prompt, *answer, 5], 12, OF_TWO)
        for prompt, answer in zip(PROMPTS, expected_of_two, strict=True)
    ]


def drawn_engine(model, data, **changes):
    """An engine with few slots and pages, small chunks, with or without drafts and prefix cache."""
    config = EngineConfig(**changes)
    limits = {
        "max_num_seqs": data.draw(st.integers(1, 5)),
        "max_num_batched_tokens": data.draw(st.sampled_from([1, 3, 16, 64])),
        "kv_cache_bytes": data.draw(st.integers(22, 70)) * page_bytes(model, config),
        "prefix_cache_bytes": data.draw(st.sampled_from([0, 20_000, 1 << 20])),
        "prefix_interval": data.draw(st.sampled_from([3, 8, 50])),
        "max_draft_tokens": data.draw(st.sampled_from([0, 1, 4])),
        "adapts_drafts": data.draw(st.booleans()),
    }
    return Engine(model, replace(config, **limits))


def assert_is_empty(engine):
    while engine.prefixes.evict():
        pass
    assert engine.cache.pool.num_free == len(engine.cache.pool)
    assert engine.stats().num_running == engine.stats().num_waiting == 0


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_schedule_changes_a_token(model, expected, expected_of_two, expected_after, data):
    engine = drawn_engine(model, data, page_size=4)
    which = data.draw(st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=9))
    of_two = replace(GREEDY, logit_bias=dict.fromkeys(OF_TWO, 100.0))
    kinds = data.draw(st.lists(st.booleans(), min_size=len(which), max_size=len(which)))
    requests = [
        request(str(i), PROMPTS[p], of_two if kinds[i] else GREEDY) for i, p in enumerate(which)
    ]
    at = {str(i): data.draw(st.integers(0, 12)) for i in range(len(which))}
    answers = run(engine, requests, at=at)
    for i, p in enumerate(which):
        wanted = expected_of_two[p] if kinds[i] else expected[p]
        assert answers[str(i), 0] == wanted, f"request {i}, prompt {p}"
    after = [p for i, p in enumerate(which) if kinds[i]]
    more = [
        request(str(i), [*PROMPTS[p], *expected_of_two[p], 5], of_two) for i, p in enumerate(after)
    ]
    answers = run(engine, more)
    for i, p in enumerate(after):
        assert answers[str(i), 0] == expected_after[p], f"after prompt {p}"
    assert_is_empty(engine)


NARROW = [
    StatePrecision(ssm="float16", keys="float8"),
    StatePrecision(ssm="int8", seed=1),
    StatePrecision(ssm="int8", rounding="nearest", keys="bfloat16"),
]


SCORED = replace(GREEDY, logprobs=0, logit_bias=dict.fromkeys(OF_TWO, 100.0))


@pytest.fixture(scope="module")
def exact_model():
    """A model in float64, in which the order of sums does not affect the rounding of states."""
    return tiny_model(CONFIG, dtype=torch.float64)


@pytest.fixture(scope="module")
def narrow_expected(exact_model):
    """Log-probabilities of answers one at a time, without prefix cache and drafts."""

    @functools.cache
    def logprobs(precision, max_num_batched_tokens, prefix_interval):
        engine = engine_for(
            exact_model, max_num_seqs=1, prefix_cache_bytes=0, max_draft_tokens=0,
            max_num_batched_tokens=max_num_batched_tokens, prefix_interval=prefix_interval,
            state=precision,
        )  # fmt: skip
        requests = [request(str(i), prompt, SCORED) for i, prompt in enumerate(PROMPTS)]
        every = run(engine, requests, scored=True)
        return [every[str(i), 0] for i in range(len(PROMPTS))]

    return logprobs


def assert_same_scores(scores, expected):
    """Assert scores much closer than with another rounding."""
    for mine, wanted in zip(scores, expected, strict=True):
        assert torch.allclose(torch.tensor(mine), torch.tensor(wanted), rtol=0, atol=2e-6)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_no_schedule_changes_how_a_narrow_state_is_rounded(exact_model, narrow_expected, data):
    """Nor do other requests, slots, drafts, cached prefixes or preemption."""
    precision = data.draw(st.sampled_from(NARROW))
    engine = drawn_engine(exact_model, data, page_size=4, state=precision)
    which = data.draw(st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=9))
    requests = [request(str(i), PROMPTS[p], SCORED) for i, p in enumerate(which)]
    at = {str(i): data.draw(st.integers(0, 12)) for i in range(len(which))}
    scores = run(engine, requests, at=at, scored=True)
    limits = engine.config
    expected = narrow_expected(precision, limits.max_num_batched_tokens, limits.prefix_interval)
    assert_same_scores([scores[str(i), 0] for i in range(len(which))], [expected[p] for p in which])
    assert_is_empty(engine)


def test_narrow_states_are_preempted_in_the_schedules_above(exact_model, narrow_expected):
    precision = NARROW[0]
    changes = {"page_size": 4, "prefix_cache_bytes": 0, "prefix_interval": 8, "state": precision}
    size = page_bytes(exact_model, EngineConfig(**changes))
    engine = Engine(exact_model, EngineConfig(max_num_seqs=4, kv_cache_bytes=24 * size, **changes))
    which = (6, 4, 3, 6)
    requests = [request(str(i), PROMPTS[p], SCORED) for i, p in enumerate(which)]
    scores = run(engine, requests, scored=True)
    expected = narrow_expected(precision, 2048, 8)
    assert_same_scores([scores[str(i), 0] for i in range(4)], [expected[p] for p in which])
    assert engine.stats().preemptions > 0
    assert engine.stats().accepted_tokens > 0
    with pytest.raises(AssertionError):
        assert_same_scores(expected, narrow_expected(precision, 2048, 50))


def test_what_the_schedules_above_are_made_of_happens(model, expected):
    """Preemption, cached prefixes and accepted drafts occur, and change nothing."""
    few = {"kv_cache_bytes": 24 * PAGE, "max_model_len": None}
    engine = engine_for(model, prefix_cache_bytes=0, **few)
    requests = [request(str(i), PROMPTS[p]) for i, p in enumerate((6, 4, 3, 6))]
    answers = run(engine, requests)
    assert [answers[str(i), 0] for i in range(4)] == [expected[p] for p in (6, 4, 3, 6)]
    assert engine.stats().preemptions > 0
    assert engine.stats().drafted_tokens > 0

    engine = engine_for(model)
    for _ in range(2):
        assert run(engine, [request("a", PROMPTS[6])]) == {("a", 0): expected[6]}
    assert engine.stats().prefix_hits == 40
    more = PROMPTS[6] + expected[6] + [5, 6, 7]
    assert run(engine, [request("b", more)])["b", 0] == greedy(model, more, 12)
    assert engine.stats().prefix_hits >= 40 + 41 + 8  # the answer was cached, too


def test_an_end_token_a_stop_condition_and_the_length_end_an_answer(model, expected):
    tokens = expected[3]

    class AtFifth:
        def __init__(self):
            self.left = 5

        def ends_at(self, _):
            self.left -= 1
            return self.left == 0

    engine = engine_for(model)
    stop = SamplingParams(temperature=0.0, ignore_eos=True, stop_token_ids=(tokens[6],))
    for wanted, length, reason in (
        (request("a", PROMPTS[3], stop), tokens.index(tokens[6]) + 1, FinishReason.STOP),
        (request("b", PROMPTS[3], make_stop=AtFifth), 5, FinishReason.STOP),
        (request("c", PROMPTS[3]), 12, FinishReason.LENGTH),
    ):
        engine.add(wanted)
        steps = []
        while engine.has_work:
            steps += engine.step()
        assert [t for step in steps for t in step.tokens] == tokens[:length]
        assert steps[-1].finish_reason is reason
    assert steps[0].prompt is not None
    whole = SamplingParams(temperature=0.0, ignore_eos=True)
    answer = run(engine, [request("d", PROMPTS[3], whole)])["d", 0]
    assert len(answer) == 96 - len(PROMPTS[3])


@pytest.mark.parametrize("length", [1, 30])
def test_several_answers_read_their_prompt_once(model, length):
    prompt = PROMPTS[4][:length]
    engine = engine_for(model, max_num_seqs=3, prefix_cache_bytes=0)
    params = SamplingParams(n=5, temperature=1.0, max_tokens=9, seed=3, ignore_eos=True)
    answers = run(engine, [request("a", prompt, params)])
    assert engine.stats().prompt_tokens == length
    assert len({tuple(answer) for answer in answers.values()}) == 5
    alone = engine_for(model, max_draft_tokens=0, max_num_batched_tokens=7)
    assert run(alone, [request("z", prompt, params)]) == {
        ("z", i): tokens for (_, i), tokens in answers.items()
    }
    assert engine.cache.pool.num_free == len(engine.cache.pool)


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("pattern", ["MM", "**", "EE", "--", "MEM*E-"])
@torch.no_grad()
def test_logprobs_are_the_trainers(pattern, drafts):
    """Of prompt and answer, for every kind of layer, sampled, with and without drafts."""
    config = tiny_config(pattern + "/*E")
    model = tiny_model(config)
    engine = engine_for(model, max_draft_tokens=drafts, max_num_batched_tokens=5)
    prompt = tokens_for(config, 13).tolist()
    params = SamplingParams(
        max_tokens=20, logprobs=3, prompt_logprobs=2, seed=1, temperature=0.7, ignore_eos=True
    )
    engine.add(request("a", prompt, params))
    steps = []
    while engine.has_work:
        steps += engine.step()
    answer = [t for step in steps for t in step.tokens]
    reported = [entry for step in steps for entry in step.logprobs]
    prompt_reported = steps[0].prompt.logprobs
    assert prompt_reported[0] is None
    everything = torch.tensor([prompt + answer])
    logprobs = model(everything)[0, :-1].log_softmax(-1)
    for entry, row, token in zip(
        [*prompt_reported[1:], *reported], logprobs, everything[0, 1:].tolist(), strict=True
    ):
        assert entry.token == token
        assert abs(entry.logprob - row[token].item()) < DECODE
        best = row.topk(len(entry.top))
        assert [t for t, _ in entry.top] == best.indices.tolist()
        assert entry.rank == int((row > row[token]).sum()) + 1
    assert len(reported[0].top) == 3
    assert len(prompt_reported[1].top) == 2


def test_an_aborted_request_leaves_and_the_others_go_on(model, expected):
    engine = engine_for(model)
    for i in (3, 4, 5):
        engine.add(request(str(i), PROMPTS[i]))
    tokens = {}
    for step in range(100):
        if step == 3:
            (last,) = engine.abort("4")
            assert last.finish_reason is FinishReason.ABORT
        for delta in engine.step():
            tokens.setdefault(delta.request_id, []).extend(delta.tokens)
    assert engine.abort("4") == []
    assert tokens["3"] == expected[3]
    assert tokens["5"] == expected[5]
    assert len(tokens.get("4", [])) < 12
    assert not engine.has_work


def test_what_can_never_be_answered_is_refused_before_it_runs(model):
    engine = engine_for(model, max_num_waiting=2)
    cases = [
        ((), GREEDY, "no tokens"),
        ((1,) * 96, GREEDY, "has 96 tokens.*may have 96"),
        ((1,) * 90, GREEDY, "max_tokens is 12 and the prompt has 90"),
        ((1, 97), GREEDY, "prompt has token 97; the vocabulary has 97"),
        ((1,), SamplingParams(logit_bias={200: 1.0}), "logit_bias has token 200"),
    ]
    for prompt, params, message in cases:
        with pytest.raises(ConfigError, match=message):
            engine.add(request("a", prompt, params))
    engine.add(request("a", (1, 2)))
    with pytest.raises(ConfigError, match="'a' is being answered already"):
        engine.add(request("a", (1, 2)))
    engine.add(request("b", (1, 2)))
    assert not engine.has_room(request("c", (1, 2)))
    assert len(run(engine, [])) == 2
    with pytest.raises(ConfigError, match="hold 1 pages"):
        engine_for(model, kv_cache_bytes=PAGE)
    with pytest.raises(ConfigError, match="hold sequences of 20 tokens, not of 96"):
        engine_for(model, kv_cache_bytes=10 * PAGE)
    with pytest.raises(ConfigError, match="has no multi-token-prediction block"):
        engine_for(tiny_model("M*"), max_draft_tokens=1)


@torch.inference_mode()
def read_by(engine, prompt, **more):
    """Tokens of each prefill call."""
    engine.add(request("counted", prompt, **more))
    engine.scheduler.admit()
    calls = []
    while any(not sequence.is_prefilled for sequence in engine.scheduler.running):
        [chunks] = engine.scheduler.schedule_prefill()
        calls.append(chunks[0][1])
        engine.step()
    while engine.has_work:
        engine.step()
    return calls


@pytest.mark.parametrize("state", [StatePrecision(), *NARROW])
def test_what_follows_a_kept_state_is_read_in_one_call(model, state):
    engine = engine_for(model, prefix_interval=32, max_num_batched_tokens=64, state=state)
    prompt = tokens_for(CONFIG, 60, seed=3).tolist()
    ends_message = (30,)
    first = read_by(engine, prompt[:33], boundaries=ends_message)
    again = read_by(engine, [*prompt[:30], *prompt[40:52]], boundaries=ends_message)
    if state.is_narrow:  # where chunks end has to be the same wherever reading begins
        assert (first, again) == ([30, 2, 1], [2, 10])
    else:
        assert (first, again) == ([30, 3], [12])
    assert engine.stats().prefix_hits == 30
    # Far from other cached states, a state is cached at every interval.
    assert read_by(engine, prompt[::-1]) == [32, 28]


def test_chunks_of_a_step_are_the_models_own_pass(model):
    passes, plain = (engine_for(model, prefix_interval=64)._runner for _ in range(2))
    with torch.inference_mode():
        for seed, lengths in enumerate([(9, 9), (5, 5), (5, 5), (30, 2), (5, 5), (1, 1)]):
            tokens = [tokens_for(CONFIG, n, seed=seed + n + 40 * i).tolist() for i, n in
                      enumerate(lengths)]  # fmt: skip
            hidden = passes.prefill(tokens, [2, 0]).hidden
            layout = plain.cache.layout(lengths, [2, 0], is_prompt=True)
            flat = torch.tensor([token for part in tokens for token in part])
            expected = model.hidden_states(flat, layout=layout, state=plain.cache)
            assert torch.equal(hidden, expected), f"call {seed}"
            assert passes.cache.lengths == plain.cache.lengths


def test_other_weights_find_no_prefix_of_the_old_ones(model):
    engine = engine_for(model)
    run(engine, [request("a", PROMPTS[6])])
    engine.invalidate_caches()
    run(engine, [request("a", PROMPTS[6])])
    assert engine.stats().prefix_hits == 0


def test_other_weights_find_nothing_that_running_answers_keep():
    """An answer that continues over a change of weights has a state of both versions, from which no
    other request may start."""
    ours = tiny_model(CONFIG)
    engine = engine_for(ours, max_num_seqs=1)
    prompt = PROMPTS[6]
    answer = []
    engine.add(request("a", prompt, GREEDY))
    while engine.has_work:
        answer += [token for delta in engine.step() for token in delta.tokens]
        if len(answer) == 3:
            randomized(ours, 5)
            engine.invalidate_caches(running="keep")
            answer.append(-1)
    answer.remove(-1)
    more = [*prompt, *answer, 5]
    assert run(engine, [request("b", more)])["b", 0] == greedy(ours, more, 12)
    assert engine.stats().prefix_hits == 0


def test_an_answer_that_waited_for_the_prompt_reads_it_with_the_new_weights():
    ours = tiny_model(CONFIG)
    engine = engine_for(ours, max_num_seqs=1)
    engine.add(request("a", PROMPTS[6], replace(GREEDY, n=2)))
    second, is_changed = [], False
    while engine.has_work:
        second += [token for p in engine.step() if p.index == 1 for token in p.tokens]
        if not is_changed:
            randomized(ours, 5)
            engine.invalidate_caches()
            is_changed = True
    assert second == greedy(ours, PROMPTS[6], 12)


@pytest.mark.parametrize("scores", [None, 0])
def test_prompts_that_are_kept_for_others_make_room(model, scores):
    """Two requests of which each fits alone: the prompt that one shares must not block both."""
    config = engine_for(model).config
    config = replace(config, max_model_len=96, prefix_cache_bytes=0, max_draft_tokens=0)
    config = replace(config, kv_cache_bytes=29 * page_bytes(model, config))
    engine = Engine(model, config)
    params = replace(GREEDY, n=2, max_tokens=76, prompt_logprobs=scores)
    prompts = {name: tuple(range(start, start + 20)) for name, start in (("a", 3), ("b", 33))}
    for name, prompt in prompts.items():
        engine.add(request(name, prompt, params))
    answers = {}
    for _ in range(3000):
        for delta in engine.step():
            answers.setdefault((delta.request_id, delta.index), []).extend(delta.tokens)
        if not engine.has_work:
            break
    assert_is_empty(engine)
    for (name, _), answer in answers.items():
        assert answer == greedy(model, prompts[name], 76)
    assert len(answers) == 4


def test_other_weights_in_tensors_of_their_own_are_used_by_every_step(expected):
    ours, other = tiny_model(CONFIG), tiny_model(CONFIG, seed=5)
    engine = engine_for(ours, adapts_drafts=False)
    of_two = replace(GREEDY, logit_bias=dict.fromkeys(OF_TWO, 100.0))
    assert run(engine, [request("a", PROMPTS[3])])["a", 0] == expected[3]
    for part in ("parameters", "buffers"):  # the routers' biases are buffers
        for mine, theirs in zip(getattr(ours, part)(), getattr(other, part)(), strict=True):
            mine.data = theirs.data.clone()
    engine.invalidate_caches()
    assert run(engine, [request("a", PROMPTS[3])])["a", 0] == greedy(other, PROMPTS[3], 12)
    before = engine.stats()
    answer = run(engine, [request("a", PROMPTS[3], of_two)])["a", 0]
    assert answer == greedy(other, PROMPTS[3], 12, OF_TWO)
    fresh = engine_for(other, adapts_drafts=False)
    run(fresh, [request("a", PROMPTS[3], of_two)])
    accepted = engine.stats().accepted_tokens - before.accepted_tokens
    assert accepted == fresh.stats().accepted_tokens  # the draft block has them too


def test_one_answer_that_cannot_go_on_leaves_the_others(model, expected):
    class Impossible:
        def mask(self):
            raise DataError("the grammar has no way on")

        def accept(self, _):
            pass

        def fork(self):
            return self

    engine = engine_for(model)
    engine.add(request("good", PROMPTS[3]))
    engine.add(request("bad", PROMPTS[4], make_constraint=Impossible))
    steps = []
    while engine.has_work:
        steps += engine.step()
    (bad,) = [step for step in steps if step.request_id == "bad"]
    assert (bad.finish_reason, bad.error) == (FinishReason.ERROR, "the grammar has no way on")
    assert bad.failure is FailureKind.GRAMMAR
    good = [t for step in steps if step.request_id == "good" for t in step.tokens]
    assert good == expected[3]
