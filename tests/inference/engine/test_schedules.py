"""No schedule changes any output of a request: all outputs are compared with those alone."""

import functools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron3.inference.config import EngineConfig
from nemotron3.inference.engine import Engine
from nemotron3.inference.engine.memory import page_bytes
from nemotron3.inference.frontend import Frontend
from nemotron3.inference.requests import SamplingParams, StructuredOutput
from tests.inference.engine.schedules import Ask, assert_counts, assert_same, serve
from tests.inference.texts import text_model, tokenizer

TOLERANCE = 2e-5
"""Of log-probabilities in float32, which are of the scale of ten."""
PAGE_SIZE = 8


@functools.cache
def frontend():
    model, text = text_model(), tokenizer()
    return Frontend(text, vocab_size=model.config.vocab_size, eos_ids=frozenset({2}), name="tiny")


@functools.cache
def prompts():
    front = frontend()
    ids = tokenizer().encode("the quick brown fox jumps over the lazy dog. To be, or not " * 3)
    chat = [{"role": "user", "content": "to be?"}]
    return [
        front.ids_prompt(ids[:1]),
        front.ids_prompt(ids[:9]),
        front.ids_prompt(ids[:34]),
        front.ids_prompt([*ids[:34], *ids[3:9]]),  # begins like the one before
        front.chat_prompt(chat),
        front.chat_prompt(chat, enable_thinking=False),
    ]


@functools.cache
def lively():
    """Biases that make line ends, the end of reasoning, and a few words likely."""
    text = tokenizer()
    tokens = [*text.encode("\n"), *text.encode(" the be fox"), text.think_end_id]
    return dict.fromkeys(tokens, 3.0)


GRAMMAR = StructuredOutput(kind="regex", value="[a-z ]{2,9}")


def params_drawn():
    def build(*, is_lively, has_grammar, **given):
        if is_lively:
            given["logit_bias"] = lively()
        if has_grammar and given["n"] == 1:
            given |= {"structured": GRAMMAR, "ignore_eos": False}  # they alone end such an answer
        return SamplingParams(**given)

    return st.builds(
        build,
        is_lively=st.booleans(),
        has_grammar=st.sampled_from([False, False, False, True]),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        max_tokens=st.integers(1, 26),
        min_tokens=st.sampled_from([0, 0, 1]),
        temperature=st.sampled_from([0.0, 0.7, 1.2]),
        top_p=st.sampled_from([1.0, 0.9]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        seed=st.integers(0, 3),
        stop=st.sampled_from([(), (), ("e",), ("be", " fox"), ("</think>",)]),
        include_stop_str_in_output=st.booleans(),
        ignore_eos=st.booleans(),
        logprobs=st.sampled_from([None, 0, 2]),
        prompt_logprobs=st.sampled_from([None, None, 0, 2]),
        reasoning_budget=st.sampled_from([None, 0, 1, 5, 12]),
        reasoning_grace=st.sampled_from([0, 0, 4]),
    )


def asks_drawn():
    return st.builds(
        lambda place, params, arrives, leaves: Ask(
            prompts()[place], params, arrives, None if leaves is None else arrives + leaves
        ),
        st.integers(0, 5),
        params_drawn(),
        st.integers(0, 10),
        st.sampled_from([None, None, None, None, 1, 6, 15]),
    )


@functools.cache
def alone_engine():
    limits = {"max_num_seqs": 3, "max_model_len": 128, "page_size": PAGE_SIZE}
    return Engine(text_model(), EngineConfig(**limits, prefix_cache_bytes=0, max_draft_tokens=0))


def alone(ask):
    """The request alone, without prefix cache, drafts, chunks and preemption."""
    (output,) = serve(alone_engine(), frontend(), [replace(ask, arrives=0, leaves=None)])
    return output


def crowded_engine(pages, **changes):
    config = EngineConfig(page_size=PAGE_SIZE, **changes)
    size = pages * page_bytes(text_model(), config)
    return Engine(text_model(), replace(config, kv_cache_bytes=size))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_schedule_changes_what_a_request_is_told(data):
    engine = crowded_engine(
        data.draw(st.integers(13, 40), "pages"),
        max_num_seqs=data.draw(st.integers(1, 6), "seqs"),
        max_num_batched_tokens=data.draw(st.sampled_from([1, 4, 16, 64]), "chunk"),
        prefix_cache_bytes=data.draw(st.sampled_from([0, 20_000, 1 << 20]), "prefixes"),
        prefix_interval=data.draw(st.sampled_from([3, 8, 50]), "interval"),
        max_draft_tokens=data.draw(st.sampled_from([0, 1, 4]), "drafts"),
        adapts_drafts=data.draw(st.booleans(), "adapts"),
    )
    asks = data.draw(st.lists(asks_drawn(), min_size=1, max_size=6), "asks")
    for ask, output in zip(asks, serve(engine, frontend(), asks), strict=True):
        assert_same(output, alone(ask), tolerance=TOLERANCE)
        assert_counts(output, engine, ask.params)
    while engine.prefixes.evict():
        pass
    assert engine.cache.pool.num_free == len(engine.cache.pool)
    assert engine.stats().num_running == engine.stats().num_waiting == 0


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("n", [1, 2])
def test_prompt_logprobs_of_a_prompt_that_is_preempted_while_it_is_read(n, drafts):
    ids = tokenizer().encode("the quick brown fox jumps over the lazy dog. " * 20)
    writes = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    reads = replace(writes, max_tokens=4, prompt_logprobs=1, logprobs=1, n=n)
    asks = [Ask(frontend().ids_prompt(ids[:16]), writes), Ask(frontend().ids_prompt(ids), reads)]
    pages = -(-(len(ids) + 1) // PAGE_SIZE) + 4
    engine = crowded_engine(
        pages, max_num_seqs=1 + n, max_num_batched_tokens=4, prefix_cache_bytes=0,
        max_draft_tokens=drafts,
    )  # fmt: skip
    outputs = serve(engine, frontend(), asks)
    assert engine.stats().preemptions > 0
    large = Engine(text_model(), EngineConfig(max_num_seqs=n, prefix_cache_bytes=0))
    (expected,) = serve(large, frontend(), asks[1:])
    assert_same(outputs[1], expected, tolerance=TOLERANCE)
    assert len(outputs[1].prompt_logprobs) == len(ids)


def test_tokens_found_again_after_a_preemption_are_not_told_as_cached():
    """After a preemption a request may restart from a cached state that it computed itself."""
    ids = tokenizer().encode("the quick brown fox jumps over the lazy dog. " * 20)
    writes = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    asks = [
        Ask(frontend().ids_prompt(ids[:16]), writes),
        Ask(frontend().ids_prompt(ids), replace(writes, max_tokens=4)),
    ]
    pages = -(-(len(ids) + 1) // PAGE_SIZE) + 4
    engine = crowded_engine(
        pages, max_num_seqs=2, max_num_batched_tokens=4, prefix_interval=16, max_draft_tokens=0
    )
    outputs = serve(engine, frontend(), asks)
    assert engine.stats().preemptions > 0
    assert outputs[1].num_cached_tokens == 0


def test_accepted_drafts_are_tokens_of_the_answer():
    """Accepted drafts after the end of the answer are not part of it."""
    of_two = dict.fromkeys(tokenizer().encode(" the")[:1] + tokenizer().encode(" be")[:1], 100.0)
    engine = crowded_engine(40, max_num_seqs=1, max_draft_tokens=4, adapts_drafts=False)
    counts = []
    for length in range(2, 8):
        params = SamplingParams(max_tokens=length, temperature=0.0, logit_bias=of_two, seed=1)
        (output,) = serve(engine, frontend(), [Ask(prompts()[1], params)])
        counts.append(output.outputs[0].acceptance)
        assert counts[-1].accepted < length  # the first token is never a draft
    assert any(count.accepted for count in counts)
    assert engine.stats().accepted_tokens == sum(count.accepted for count in counts)
