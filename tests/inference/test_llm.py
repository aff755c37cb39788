"""LLM and AsyncLLM: texts and conversations in, answers out, whole or in pieces."""

import asyncio
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from nemotron3 import LLM, AsyncLLM, EngineConfig, SamplingParams
from nemotron3.errors import ConfigError, DataError, OverloadedError
from nemotron3.inference.base_llm import name_of
from nemotron3.inference.requests import FailureKind, FinishReason, StructuredOutput
from nemotron3.text import CallDelta, ContentDelta, ReasoningDelta
from tests.inference.texts import text_model, tokenizer
from tests.tiny import tiny_model, tokens_for
from tests.tolerances import DECODE

SMALL = EngineConfig(max_num_seqs=4, page_size=8, prefix_interval=16, max_model_len=900)
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
TALK = [{"role": "user", "content": "to be?"}]


@pytest.fixture(scope="module")
def llm():
    return LLM(text_model(), tokenizer=tokenizer(), config=SMALL)


def async_llm(**changes):
    config = EngineConfig(**({"max_num_seqs": 4, "page_size": 8, "max_model_len": 400} | changes))
    return AsyncLLM(text_model(), tokenizer=tokenizer(), config=config)


def test_texts_ids_and_prompts_are_continued_in_their_order(llm):
    ids = tokenizer().encode("the quick")
    texts, both = (
        llm.generate(["the quick", "not to be"], GREEDY),
        llm.generate([ids, "fox"], GREEDY),
    )
    assert texts[0].outputs[0].token_ids == both[0].outputs[0].token_ids
    answer = texts[1].outputs[0]
    assert len(answer.token_ids) == 24
    assert answer.finish_reason is FinishReason.LENGTH
    plain = [i for i in answer.token_ids if i not in tokenizer().special_ids]
    assert answer.text == answer.content == tokenizer().decode(plain)
    assert answer.acceptance.drafted > 0
    assert 0 < texts[0].first_token_s <= texts[0].total_s


def test_pieces_join_to_the_whole(llm):
    pieces = {}
    outputs = llm.chat(
        [TALK, TALK, TALK],
        [GREEDY, SamplingParams(seed=1, max_tokens=40), SamplingParams(seed=2, max_tokens=40, n=2)],
        on_delta=lambda place, delta: pieces.setdefault((place, delta.index), []).append(delta),
    )
    assert len(pieces) == 4
    for (place, index), deltas in pieces.items():
        whole = outputs[place].outputs[index]
        parts = [part for delta in deltas for part in delta.parts]
        assert "".join(p.text for p in parts if isinstance(p, ReasoningDelta)) == whole.reasoning
        assert "".join(p.text for p in parts if isinstance(p, ContentDelta)) == whole.content
        assert tuple(t for delta in deltas for t in delta.token_ids) == whole.token_ids
        assert deltas[-1].finish_reason is whole.finish_reason is not None
        assert all(delta.finish_reason is None for delta in deltas[:-1])


def test_reasoning_stays_within_its_budget(llm):
    for budget in (0, 1, 7, 1000):
        params = SamplingParams(temperature=0.0, max_tokens=24, reasoning_budget=budget)
        answer = llm.chat(TALK, params)[0].outputs[0]
        end = tokenizer().think_end_id
        if budget < 24:
            assert end in answer.token_ids[: budget + 2]
            assert answer.num_reasoning_tokens <= budget
            assert answer.content
        else:
            assert answer.num_reasoning_tokens > 7
    off = llm.chat(TALK, GREEDY, enable_thinking=False)[0].outputs[0]
    assert (off.reasoning, off.num_reasoning_tokens) == ("", 0)
    assert off.content


def test_a_stop_string_ends_the_answer_wherever_tokens_end(llm):
    whole = llm.generate("the quick", GREEDY)[0].outputs[0]
    for start in range(2, 12, 3):
        stop = whole.text[start : start + 4]
        params = SamplingParams(
            temperature=0.0, max_tokens=24, ignore_eos=True, stop=(stop, "zzzz")
        )
        pieces = []
        (output,) = llm.generate("the quick", params, on_delta=lambda _, d: pieces.append(d))  # noqa: B023
        answer = output.outputs[0]
        assert answer.text == whole.text[: whole.text.index(stop)]
        assert (answer.finish_reason, answer.stop_reason) == (FinishReason.STOP, stop)
        assert "".join(part.text for d in pieces for part in d.parts) == answer.text
        kept = replace(params, include_stop_str_in_output=True)
        (output,) = llm.generate("the quick", kept)
        assert output.outputs[0].text == whole.text[: whole.text.index(stop)] + stop


@pytest.mark.parametrize("seed", range(12))
def test_content_has_the_logprobs_of_its_own_tokens(llm, seed):
    """No reasoning, no tag, no end; streamed or whole, also where a stop string cuts a token."""
    params = SamplingParams(
        seed=seed,
        max_tokens=30,
        reasoning_budget=seed % 7,
        logprobs=0,
        logit_bias={llm.tokenizer.encode(" quick")[-1]: 4},
        stop=("ick",) if seed % 2 else (),
    )
    streamed = []
    output = llm.chat(
        [{"role": "user", "content": "hello"}],
        params,
        on_delta=lambda _, delta: streamed.extend(delta.content_logprobs),
    )
    answer = output[0].outputs[0]
    assert tuple(streamed) == answer.content_logprobs
    spelled = b"".join(llm.tokenizer.token_bytes(each.token) for each in streamed)
    text = spelled.decode("utf-8", "replace").lstrip()
    if answer.stop_reason in params.stop:
        assert text.startswith(answer.content)
    else:
        assert text == answer.content


def test_a_stop_token_is_reported_and_not_shown(llm):
    whole = llm.generate("the quick", GREEDY)[0].outputs[0]
    token = next(t for t in whole.token_ids[3:] if t not in tokenizer().special_ids)
    params = SamplingParams(
        temperature=0.0, max_tokens=24, ignore_eos=True, stop_token_ids=(token,)
    )
    answer = llm.generate("the quick", params)[0].outputs[0]
    place = whole.token_ids.index(token)
    assert answer.token_ids == whole.token_ids[: place + 1]
    assert answer.stop_reason == token
    assert not answer.text.endswith(tokenizer().decode([token]))


def test_a_form_is_kept_after_the_reasoning(llm):
    params = SamplingParams(
        seed=4, max_tokens=60, reasoning_budget=5,
        structured=StructuredOutput(kind="choice", value=["yes", "not to be"]),
    )  # fmt: skip
    answer = llm.chat(TALK, params)[0].outputs[0]
    assert answer.content.strip() in ("yes", "not to be")
    assert answer.finish_reason is FinishReason.STOP


def test_requests_can_be_added_while_others_are_answered(llm):
    params = SamplingParams(max_tokens=6, temperature=0, n=2)
    texts = ["To be", "or not", "to be"]
    alone = [llm.generate(text, params)[0].outputs for text in texts]
    ended = []
    with llm.requests() as requests:
        requests.add(llm._prompt(texts[0]), params)
        while requests.has_work:
            for place, answer in requests.step():
                ended.append((place, answer.index))
                if answer.index == 0 and place < 2:
                    assert requests.add(llm._prompt(texts[place + 1]), params) == place + 1
        found = [output.outputs for output in requests.outputs()]
    assert [[a.token_ids for a in each] for each in found] == [
        [a.token_ids for a in each] for each in alone
    ]
    assert sorted(ended) == [(place, index) for place in range(3) for index in range(2)]
    with llm.requests() as requests:
        requests.add(llm._prompt(texts[0]), params)
        requests.step()
    assert not llm.generate("x", SamplingParams(max_tokens=1))[0].outputs[0].error


def test_a_second_turn_reuses_the_first(llm):
    first = llm.chat(TALK, GREEDY, enable_thinking=False)[0].outputs[0]
    more = [
        *TALK,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": "the lazy dog?"},
    ]
    output = llm.chat(more, GREEDY, enable_thinking=False)[0]
    assert output.num_cached_tokens > 10
    alone = LLM(text_model(), tokenizer=tokenizer(), config=SMALL)
    again = alone.chat(more, GREEDY, enable_thinking=False)[0]
    assert again.outputs[0].token_ids == output.outputs[0].token_ids


@pytest.mark.parametrize("n", [1, 3])
def test_the_prefix_cache_has_nothing_of_a_request_that_nobody_continues(llm, n):
    engine, answers = LLM(text_model(), tokenizer=tokenizer(), config=SMALL), []
    prompt = llm.chat([TALK * 3], GREEDY)[0].prompt  # with beginnings of turns in it
    for may_be_continued in (False, True):
        with engine.requests() as requests:
            params = SamplingParams(seed=3, n=n, max_tokens=24, ignore_eos=True)
            requests.add(prompt, params, may_be_continued=may_be_continued)
            while requests.has_work:
                requests.step()
            (output,) = requests.outputs()
        answers.append([answer.token_ids for answer in output.outputs])
        assert bool(engine.stats().prefix_bytes) == may_be_continued
    assert answers[0] == answers[1]


def test_a_reset_prefix_cache_is_that_of_a_new_engine():
    llm = LLM(text_model(), tokenizer=tokenizer(), config=SMALL)
    first = llm.chat(TALK, GREEDY)[0]
    assert llm.chat(TALK, GREEDY)[0].num_cached_tokens > 0
    llm.reset_prefix_cache()
    again = llm.chat(TALK, GREEDY)[0]
    assert again.num_cached_tokens == 0
    assert again.outputs[0].token_ids == first.outputs[0].token_ids


def test_what_cannot_be_asked_is_refused_by_name(llm):
    with pytest.raises(DataError, match="prompt is empty"):
        llm.generate("", GREEDY)
    with pytest.raises(ConfigError, match="2 prompts were given and 1 params"):
        llm.generate(["a", "b"], [GREEDY])
    bad = SamplingParams(structured=StructuredOutput(kind="regex", value="("))
    with pytest.raises(ConfigError):
        llm.chat([TALK, TALK], [GREEDY, bad])
    assert llm.stats().num_running == llm.stats().num_waiting == 0


def test_a_step_that_fails_ends_every_answer_that_was_open():
    """Including an answer that ended in the failed step, of which the engine has no record."""
    server = async_llm(max_num_seqs=1)
    step = server._engine.step

    def failing():
        progress = step()
        if any(p.index == 1 and p.finish_reason for p in progress):
            raise RuntimeError("what the step did next fails")
        return progress

    server._engine.step = failing

    async def read():
        params = replace(GREEDY, n=2, max_tokens=4, ignore_eos=True)
        prompt = server.prepare_text("to be")
        async with server.submit(prompt, params, request_id="a") as stream:
            return [(delta.index, delta.finish_reason) async for delta in stream]

    ends = [end for end in asyncio.run(asyncio.wait_for(read(), 20)) if end[1] is not None]
    server.close()
    assert (1, FinishReason.ERROR) in ends
    assert sorted(index for index, _ in ends) == [0, 1]


def test_streams_of_many_clients_are_the_answers_of_one(llm):
    texts = ["the quick", "not to be", "fox", "dog. To", "that is", "brown fox jumps"]
    expected = [output.outputs[0] for output in llm.generate(texts, GREEDY)]

    async def client(server, text, name):
        async with server.submit(server.prepare_text(text), GREEDY, request_id=name) as stream:
            report = await stream.prompt_report()
            tokens = [token async for delta in stream for token in delta.token_ids]
        assert report.num_cached_tokens == 0
        output = stream.output()
        assert list(output.outputs[0].token_ids) == tokens
        return output.outputs[0]

    async def everyone():
        server = async_llm()
        answers = await asyncio.gather(
            *(client(server, text, str(i)) for i, text in enumerate(texts))
        )
        assert await server.drain(5)
        assert server.stats().num_running == 0
        server.close()
        assert not server.is_alive
        return answers

    for answer, wanted in zip(asyncio.run(everyone()), expected, strict=True):
        assert answer.token_ids == wanted.token_ids
        assert answer.text == wanted.text


def test_leaving_early_aborts_and_a_full_queue_refuses(llm):
    long = SamplingParams(temperature=0.0, ignore_eos=True)

    async def leave():
        server = async_llm(max_num_seqs=1, max_num_waiting=1)
        prompt = server.prepare_text("the quick")
        async with server.submit(prompt, long, request_id="a") as first:
            async for _ in first:
                break
            with pytest.raises(ConfigError, match="'a' is being answered already"):
                server.submit(prompt, long, request_id="a")
            second = server.submit(prompt, GREEDY, request_id="b")
            with pytest.raises(OverloadedError, match=r"2 answers.*at most 2"):
                server.submit(prompt, long, request_id="c")
            with pytest.raises(ConfigError, match="may have 400"):
                server.submit(prompt, SamplingParams(max_tokens=500), request_id="d")
        tokens = [token async for delta in second for token in delta.token_ids]
        assert len(tokens) == 24
        remaining = [delta async for delta in first]
        assert remaining[-1].finish_reason is FinishReason.ABORT

        async def wait_for_ever():
            async for _ in server.submit(prompt, long, request_id="e"):
                pass

        task = asyncio.create_task(wait_for_ever())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await server.drain(5)
        server.close()
        with pytest.raises(OverloadedError, match="has been closed"):
            server.submit(prompt, GREEDY, request_id="f")

    before = threading.active_count()
    asyncio.run(leave())
    assert threading.active_count() == before


def test_a_step_that_fails_is_told_to_those_who_wait_and_the_engine_goes_on(monkeypatch):
    async def fail():
        server = async_llm()
        prompt = server.prepare_text("the quick")
        step = server._engine.step
        monkeypatch.setattr(server._engine, "step", lambda: 1 / 0)
        stream = server.submit(prompt, GREEDY, request_id="a")
        deltas = [delta async for delta in stream]
        assert deltas[-1].finish_reason is FinishReason.ERROR
        assert "failed in this step" in deltas[-1].error
        assert deltas[-1].failure is stream.output().outputs[0].failure is FailureKind.ENGINE
        monkeypatch.setattr(server._engine, "step", step)
        again = server.submit(prompt, GREEDY, request_id="a")
        assert len([t async for delta in again for t in delta.token_ids]) == 24
        server.close()

    asyncio.run(fail())


def test_calls_come_out_of_an_answer(llm):
    """A grammar makes the model call a tool, and the chat's parser reads the call."""
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}}}}]  # fmt: skip
    call = "<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n"
    grammar = 'start: <tool_call> "\\n" call </tool_call>\ncall: ' + repr(call).replace("'", '"')
    params = SamplingParams(
        temperature=0.0, max_tokens=80, structured=StructuredOutput(kind="grammar", value=grammar)
    )
    pieces = []
    answer = llm.chat(
        TALK, params, tools=tools, enable_thinking=False,
        on_delta=lambda _, delta: pieces.extend(delta.parts),
    )[0].outputs[0]  # fmt: skip
    (read,) = answer.tool_calls
    assert (read.name, read.arguments, read.is_complete) == (
        "get_weather",
        '{"city": "Paris"}',
        True,
    )
    assert any(isinstance(piece, CallDelta) for piece in pieces)
    assert answer.content.strip() == ""


@pytest.mark.parametrize(
    ("path", "name"),
    [("runs/tiny/model", "tiny"), ("models/nano-30b", "nano-30b"), ("/model", "model")],
)
def test_a_model_has_the_name_of_its_run_or_directory(path, name):
    assert name_of(Path(path)) == name


def test_token_ids_need_no_tokenizer(llm):
    ids = tokenizer().encode("the quick")
    bare = LLM(text_model(), config=SMALL)
    pieces = []
    params = replace(GREEDY, logprobs=1, prompt_logprobs=0)
    (output,) = bare.generate([ids], params, on_delta=lambda _, delta: pieces.append(delta))
    (wanted,) = llm.generate([ids], params)
    answer = output.outputs[0]
    assert answer.token_ids == wanted.outputs[0].token_ids
    assert answer.text == answer.content == ""
    assert len(answer.logprobs) == len(answer.token_ids) == 24
    assert len(output.prompt_logprobs) == len(ids)
    assert tuple(token for delta in pieces for token in delta.token_ids) == answer.token_ids
    stop = answer.token_ids[4]
    (stopped,) = bare.generate([ids], replace(GREEDY, stop_token_ids=(stop,)))
    assert stopped.outputs[0].stop_reason == stop
    regex = StructuredOutput(kind="regex", value="a")
    for what, ask in {
        "text": lambda: bare.generate("the quick", GREEDY),
        "stop": lambda: bare.generate([ids], replace(GREEDY, stop=("a",))),
        "reasoning_budget": lambda: bare.generate([ids], replace(GREEDY, reasoning_budget=3)),
        "structured output": lambda: bare.generate([ids], replace(GREEDY, structured=regex)),
        "text ": lambda: bare.chat(TALK, GREEDY),
    }.items():
        with pytest.raises(ConfigError, match=f"^{what}.*needs a tokenizer.*tokenizer="):
            ask()
    assert not bare.stats().num_running


def test_a_model_is_sampled_from_while_it_is_trained():
    """Training has the same losses and weights, and answers come from the current weights."""

    def train(*, samples):
        model = tiny_model("MEM*E/*E").train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        llm = LLM(model, config=EngineConfig(max_num_seqs=2, max_model_len=64)) if samples else None
        tokens = tokens_for(model.config, 2, 20)
        losses = []
        for step in range(3):
            loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            if llm is not None and step:  # between a forward and its backward pass
                (output,) = llm.generate([tokens[0, :7].tolist()], replace(GREEDY, logprobs=0))
                answer = output.outputs[0]
                whole = torch.tensor([[*tokens[0, :7].tolist(), *answer.token_ids]])
                with torch.no_grad():
                    logprobs = model(whole)[0, 6:-1].log_softmax(-1)
                for row, entry in zip(logprobs, answer.logprobs, strict=True):
                    assert abs(row[entry.token].item() - entry.logprob) < DECODE
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if llm is not None:
                llm.invalidate_caches()
            losses.append(loss.item())
        assert model.training
        assert all(p.requires_grad and not p.is_inference() for p in model.parameters())
        noise = torch.rand(1).item()  # PyTorch's global generator was not used
        return losses, noise, [p.detach().clone() for p in model.parameters()]

    torch.manual_seed(3)
    alone = train(samples=False)
    torch.manual_seed(3)
    beside = train(samples=True)
    assert alone[:2] == beside[:2]
    assert all(torch.equal(a, b) for a, b in zip(alone[2], beside[2], strict=True))


def test_weights_are_replaced_in_the_middle_of_a_stream(llm):
    """By the event loop, while the engine's thread runs; the other requests go on."""
    new = tiny_model(text_model().config, seed=5)

    async def read(server):
        prompt = server.prepare_text("the quick")
        params = replace(GREEDY, max_tokens=200, logprobs=0)
        async with server.submit(prompt, params, request_id="a") as stream:
            async for delta in stream:
                if delta.token_ids and server.weight_version == 0:
                    with pytest.raises(ConfigError, match="lack"):
                        await server.update_weights({})
                    assert await server.update_weights(new.state_dict(), version=3) == 3
        return stream.output().outputs[0]

    async def paused(server):
        prompt = server.prepare_text("not to be")
        await server.pause_generation()
        assert server.is_paused
        async with server.submit(prompt, GREEDY, request_id="b") as stream:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(stream.prompt_report(), 0.1)
            assert server.stats().num_running == 0

    async def everything():
        ours = tiny_model(text_model().config)
        config = EngineConfig(max_num_seqs=4, page_size=8, max_model_len=400)
        server = AsyncLLM(ours, tokenizer=tokenizer(), config=config)
        answer = await asyncio.wait_for(read(server), 60)
        await paused(server)
        await server.resume_generation()
        assert await server.invalidate_caches() == 4
        server.close()
        with pytest.raises(OverloadedError, match="has been closed"):
            await server.update_weights(new.state_dict())
        return answer

    answer = asyncio.run(everything())
    assert len(answer.weight_versions) == len(answer.token_ids) == 200
    assert set(answer.weight_versions) == {0, 3}
    assert sorted(answer.weight_versions) == list(answer.weight_versions)
    assert [entry.weight_version for entry in answer.logprobs] == list(answer.weight_versions)


def test_weights_are_replaced_between_the_pieces_of_a_call():
    new = tiny_model(text_model().config, seed=5)
    llm = LLM(tiny_model(text_model().config), tokenizer=tokenizer(), config=SMALL)

    def on_delta(_, delta):
        if delta.token_ids and llm.weight_version == 0:
            llm.update_weights(new.state_dict())

    answer = llm.generate("the quick", GREEDY, on_delta=on_delta)[0].outputs[0]
    assert answer.weight_versions == (0, *(1,) * 23)
    assert llm.invalidate_caches(version=9) == llm.weight_version == 9


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"top_p": 3.0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logit_bias": {7: 1e9}}, "logit_bias[7]"),
    ],
)
def test_a_refused_parameter_is_named_as_data(given, field):
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**given)
    assert caught.value.field == field
