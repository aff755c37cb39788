"""The workloads: one stream, many clients, a long prompt, the second turn of a chat.

A workload draws new random prompts each time it runs, so that no program has cached them; the
prompts are the same for all programs. For a stream the time between its tokens is measured, for a
prompt the time to the first token.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.inference.client import Client
from benchmarks.timing import Contestant

_OPENS_TURN = 10
"""`<|im_start|>` in the family's vocabularies; for the other programs an ordinary token."""

Draw = Callable[[int], list[int]]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A name, the number of tokens that are timed, and a function that runs and times it."""

    name: str
    tokens: int
    seconds: Callable[[Client, random.Random, Draw], float]


def stream(count: int = 128, prompt: int = 128) -> Workload:
    """The tokens of one answer after the first one."""

    def seconds(client: Client, _: random.Random, draw: Draw) -> float:
        answer = client.ask(draw(prompt), count)
        return answer.last_s - answer.first_s

    return Workload(name="one stream", tokens=count - 1, seconds=seconds)


def prefill(prompt: int) -> Workload:
    """A prompt, up to the first token of its answer."""

    def seconds(client: Client, _: random.Random, draw: Draw) -> float:
        return client.ask(draw(prompt), 1).first_s

    return Workload(name=f"prompt of {prompt}", tokens=prompt, seconds=seconds)


def clients(number: int, count: int = 48) -> Workload:
    """Answers for concurrent clients, with prompts of different lengths."""

    def seconds(client: Client, chance: random.Random, draw: Draw) -> float:
        prompts = [draw(chance.randint(16, 256)) for _ in range(number)]
        return client.ask_all(prompts, count, clients=number)

    return Workload(name=f"{number} clients", tokens=number * count, seconds=seconds)


def second_turn(prompt: int = 2048, answer: int = 32, more: int = 40) -> Workload:
    """The second turn of a chat with a reasoning model, up to the first token of the answer.

    The template removes the first turn's reasoning from the history, so the second prompt diverges
    from the cached tokens right after the token that began the answer.
    """

    def seconds(client: Client, _: random.Random, draw: Draw) -> float:
        until_answer = [*draw(prompt - 3), _OPENS_TURN]
        client.ask([*until_answer, *draw(2)], answer)
        return client.ask([*until_answer, *draw(more)], 1).first_s

    return Workload(name=f"second turn after {prompt}", tokens=more, seconds=seconds)


def contestant(workload: Workload, client: Client, vocab: int) -> Contestant:
    """One program with one workload; the n-th runs of all programs have the same prompts."""
    runs = iter(range(10**9))

    def run() -> float:
        chance = random.Random(next(runs))
        return workload.seconds(client, chance, lambda n: chance.choices(range(20, vocab), k=n))

    return run


def by_transformers(workload: Workload, model: Any, vocab: int) -> Contestant | None:
    """The workload with transformers' `generate`, prompts of one length; None if unsupported."""
    runs = iter(range(10**9))

    def generate(batch: int, length: int, count: int) -> float:
        chance = torch.Generator().manual_seed(next(runs))
        tokens = torch.randint(20, vocab, (batch, length), generator=chance)
        options: dict[str, Any] = {"max_new_tokens": count, "min_new_tokens": count}
        return _timed(lambda: model.generate(tokens, do_sample=False, **options))

    match workload.name.split():
        case ["one", "stream"]:
            count = workload.tokens + 1
            return lambda: generate(1, 128, count) - generate(1, 128, 1)
        case ["prompt", "of", length]:
            return lambda: generate(1, int(length), 1)
        case [number, "clients"]:
            return lambda: generate(int(number), 136, workload.tokens // int(number))
    return None


def _timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    with torch.inference_mode():
        action()
    return time.perf_counter() - start
