"""The worker process of `benchmarks.regression`, which times rows in one checkout.

It is started by path with another checkout on PYTHONPATH, so it imports only modules that every
checkout has. A line on standard input names a model and a row; the answer is the seconds of one
turn: those of its fastest repetition, since other programs can only make a repetition slower.
"""

import sys
import time
from collections.abc import Iterable
from dataclasses import replace

import torch
from benchmarks.models import configs, tokens_of
from benchmarks.timing import Contestant, warmed
from benchmarks.workloads import PROMPT, our_decode, our_prefill, training

from benchmarks import timing
from nemotron3 import LanguageModel, ModelConfig
from nemotron3.inference.config import EngineConfig
from nemotron3.inference.engine import Engine
from nemotron3.inference.requests import SamplingParams
from nemotron3.inference.sequences import EngineRequest

STREAMS, WRITTEN = 8, 64
"""Concurrent requests in the engine's row, and the tokens of each answer."""
TURN_S = 1.0
"""Seconds for which a row is repeated in each turn."""
STEPS = 16
"""Decoding steps in one repetition."""


def main() -> None:
    """Answer the lines of standard input until it ends."""
    timing.TURN_S = 0.0  # the workloads then do one repetition, and this program counts them
    torch.set_num_threads(int(sys.argv[1]))
    made: dict[tuple[str, str], Contestant] = {}
    for line in sys.stdin:
        model, row = line.strip().split("|")
        if not any(name == model for name, _ in made):
            made.clear()  # one model's memory at a time
        if (model, row) not in made:
            made[model, row] = contestant(model, row)
        print(fastest(made[model, row]), flush=True)


def fastest(run: Contestant) -> float:
    """Seconds of the fastest of a turn's repetitions."""
    seconds, start = [run()], time.perf_counter()
    while time.perf_counter() - start < TURN_S:
        seconds.append(run())
    return min(seconds)


def contestant(name: str, row: str) -> Contestant:
    """The contestant of a row."""
    config = without_mtp(ModelConfig.preset("tiny")) if name == "tiny" else configs()[name]
    model = LanguageModel.from_config(config, seed=0)
    kind, _, number = row.partition(" ")
    match kind:
        case "train":
            return training(model.train(), tokens_of(config, 4, int(number)))
        case "prefill":
            return our_prefill(model.eval(), tokens_of(config, 1, int(number)))
        case "decode":
            return our_decode(model.eval(), tokens_of(config, int(number), PROMPT), steps=STEPS)
        case "engine":
            return engine(model.eval(), tokens_of(config, STREAMS, int(number)).tolist())
    raise ValueError(f"row {row!r} is none of train, prefill, decode, engine")


def without_mtp(config: ModelConfig) -> ModelConfig:
    """The configuration without multi-token prediction, which the workloads do not use."""
    return replace(config, hybrid_override_pattern=config.hybrid_override_pattern.split("/")[0])


def engine(model: LanguageModel, prompts: list[list[int]]) -> Contestant:
    """The engine answers all prompts together; the time includes prefill and sampling."""
    runner = Engine(model, EngineConfig(max_num_seqs=STREAMS, max_model_len=2048))
    params = SamplingParams(max_tokens=WRITTEN, temperature=1.0, seed=0, ignore_eos=True)

    def answer() -> None:
        for index, prompt in enumerate(prompts):
            request = EngineRequest(request_id=str(index), prompt=tuple(prompt), params=params)
            runner.add(request)
        exhaust(runner.step() for _ in iter(lambda: runner.has_work, False))

    return warmed(answer)


def exhaust(steps: Iterable[object]) -> None:
    """Run to the end."""
    for _ in steps:
        pass


if __name__ == "__main__":
    main()
