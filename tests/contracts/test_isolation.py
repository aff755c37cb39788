"""Engines, trainers and forward passes of one process do not notice each other.

Each workload computes in its own thread and reports every bit of its results, which must be the
same as alone. If one recorded operations of another, tokens and losses would change, or the process
would crash.
"""

import asyncio
import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations_with_replacement
from typing import Any

import pytest
import torch

from nemotron3 import LLM, AsyncLLM, EngineConfig, SamplingParams
from nemotron3.ops.backends import recorded_backends
from nemotron3.ops.graph import Graph
from nemotron3.ops.linear import linear
from nemotron3.ops.native import GraphNode, recording
from nemotron3.training.optimizers import AdamWConfig, build_optimizer
from nemotron3.training.step import TrainingStep
from tests.inference.texts import tokenizer
from tests.ops.native import needs_compiler
from tests.tiny import tiny_config, tiny_model, tokens_for
from tests.training.batches import documents, pack, pretraining

CONFIG = tiny_config("MEM*E-/*E", vocab_size=tokenizer().vocab_size + 3, eos_token_id=2)
ENGINE = EngineConfig(max_num_seqs=4, page_size=8, max_model_len=200, adapts_drafts=False)
"""The number of drafts follows the clock, and with it the shapes of steps: here it is fixed."""


def params(length: int, **changes: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, **changes)


def engine(seed: int, rounds: int) -> list[Any]:
    """Answers with their log-probabilities, of an engine that is used again and again."""
    llm, results = LLM(tiny_model(CONFIG, seed), tokenizer=tokenizer(), config=ENGINE), []
    for turn in range(rounds):
        prompts = [tokens_for(CONFIG, 3 + 5 * i, seed=turn).tolist() for i in range(5)]
        outputs = llm.generate(prompts, params(20 + turn % 3, logprobs=2))
        results += [(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in outputs]
    return results


def new_engines(seed: int, rounds: int) -> list[Any]:
    """As scripts do it: an engine for every call."""
    return [engine(seed + turn, 1) for turn in range(rounds)]


def async_engine(seed: int, rounds: int) -> list[Any]:
    """Requests that arrive together, so what a step holds follows the clock; tokens must not."""
    llm = AsyncLLM(tiny_model(CONFIG, seed), tokenizer=tokenizer(), config=ENGINE)

    async def ask(turn: int, place: int) -> Any:
        prompt = llm.prepare_text("to be, or not to be"[: 5 + place])
        name = f"{turn}.{place}"
        async with llm.submit(prompt, params(12 + place), request_id=name) as stream:
            async for _ in stream:
                pass
        (answer,) = stream.output().outputs
        assert answer.error is None
        return answer.token_ids

    async def many(turn: int) -> list[Any]:
        return await asyncio.gather(*(ask(turn, place) for place in range(9)))

    try:
        return [tokens for turn in range(rounds) for tokens in asyncio.run(many(turn))]
    finally:
        llm.close()


def training(seed: int, rounds: int) -> list[Any]:
    """Losses and gradient norms of training steps, and the weights in the end."""
    model = tiny_model(CONFIG, seed)
    optimizer = build_optimizer(model, AdamWConfig(lr=1e-3))
    step = TrainingStep(model, optimizer, pretraining(model), clip_grad_norm=1.0)
    results: list[Any] = []
    for turn in range(8 * rounds):
        batch = pack(documents(31, 1, 40, seed=turn))
        results.append(step([batch], learning_rate=1e-3))
    return [*results, *(tensor.tolist() for tensor in model.state_dict().values())]


@torch.no_grad()
def forward(seed: int, rounds: int) -> list[Any]:
    """Logits of plain forward passes."""
    model = tiny_model(CONFIG, seed)
    batches = (tokens_for(CONFIG, 1, 1 + turn % 50, seed=turn) for turn in range(16 * rounds))
    return [model(tokens).tolist() for tokens in batches]


WORKLOADS = (engine, new_engines, async_engine, training, forward)


@functools.cache
def alone(workload: Callable[[int, int], list[Any]], seed: int, rounds: int) -> list[Any]:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(workload, seed, rounds).result()


def together(
    workloads: tuple[Callable[[int, int], list[Any]], ...], seed: int, rounds: int
) -> list[list[Any]]:
    """Their results, of threads that begin at the same time."""
    start = threading.Barrier(len(workloads))

    def begin(place: int) -> list[Any]:
        start.wait()
        return workloads[place](seed + place, rounds)

    with ThreadPoolExecutor(len(workloads)) as pool:
        return list(pool.map(begin, range(len(workloads))))


def assert_the_same_as_alone(workloads: tuple[Any, ...], rounds: int, threads: int) -> None:
    torch.set_num_threads(threads)
    results = together(workloads, 1, rounds)
    for place, (workload, got) in enumerate(zip(workloads, results, strict=True)):
        assert got == alone(workload, 1 + place, rounds), f"{workload.__name__} {place}"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("pair", list(combinations_with_replacement(WORKLOADS, 2)))
def test_two_at_once_are_as_alone(pair):
    assert_the_same_as_alone(pair, rounds=2, threads=1)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "several",
    [
        (engine, engine),
        (new_engines, new_engines),
        (async_engine, async_engine),
        (engine, training),
        (async_engine, training),
        (engine, forward, forward),
        (engine, async_engine, training, forward),
    ],
)
def test_thousands_of_steps_are_as_alone(several, threads):
    """Of an engine, some twenty steps a round; of training eight."""
    assert_the_same_as_alone(several, rounds=100, threads=threads)


@needs_compiler
def test_what_other_threads_compute_is_not_recorded():
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    calls: list[Any] = []
    with ThreadPoolExecutor(1) as pool, torch.no_grad(), recording(calls):
        pool.submit(linear, x, weight).result()
        assert not calls
        wanted = linear(x, weight)
        pool.submit(linear, x, weight).result()
    assert len(calls) == 1
    assert isinstance(calls[0], GraphNode)
    graph = Graph()
    with ThreadPoolExecutor(1) as pool, torch.no_grad(), graph.record():
        y = linear(x, weight)
        pool.submit(lambda: x.add(1).mul_(2)).result()
    assert len(graph._steps) == 1
    x.mul_(2)
    graph.replay()
    torch.testing.assert_close(y, 2 * wanted)


@needs_compiler
def test_another_thread_may_train_while_one_records():
    """Its backward pass included, which no recording can hold."""

    def loss_and_gradient() -> torch.Tensor:
        x, weight = torch.ones(40, 8, requires_grad=True), torch.ones(4, 8)
        linear(x, weight).sum().backward()
        assert x.grad is not None
        return x.grad

    calls: list[Any] = []
    with ThreadPoolExecutor(1) as pool, torch.no_grad(), recording(calls):
        assert (pool.submit(loss_and_gradient).result() == 4).all()
    assert not calls


def test_a_run_notes_the_backends_that_it_used_itself():
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    with ThreadPoolExecutor(1) as pool, recorded_backends() as chosen:
        pool.submit(linear, x, weight, backend="reference").result()
        assert chosen == {}
        with recorded_backends() as inner:
            linear(x, weight, backend="torch")
        assert inner == chosen == {"linear": "torch"}
    linear(x, weight, backend="reference")
    assert chosen == {"linear": "torch"}
