"""Updates a minute of reinforcement learning: engine and trainer by turns, and at the same time.

    python -m benchmarks.rl_overlap runs/tiny-sft/model

The same run of the recipe `tiny-rl` in its ways, one after another in another order each round, so
that a slow minute of the machine hits all of them: by turns with all processors, of the trainer's
process or of two engines in processes of their own; ahead in a thread, and in a process, each side
with half of them; ahead in two processes, which share the processors with the trainer. Reading
models, the first update and held-out tasks do not count. What is compared are ratios of one run of
this program.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.timing import PAUSE_S, turns

from benchmarks import machine
from nemotron3.recipes.rl import RLRun, tiny_rl
from nemotron3.recipes.run_folder import RunCallback
from nemotron3.recipes.run_rl import rl
from nemotron3.rl.data_parallel import EnginesConfig
from nemotron3.rl.generator import AsyncConfig
from nemotron3.training.trainer import StepReport

RESULTS = Path(__file__).parent / "results"
BY_TURNS = "by turns"
WAYS = {
    BY_TURNS: (AsyncConfig(), EnginesConfig()),
    "by turns, two processes": (AsyncConfig(), EnginesConfig(num_processes=2)),
    "ahead, in a thread": (AsyncConfig(max_staleness=1), EnginesConfig()),
    "ahead, in a process": (AsyncConfig(max_staleness=1), EnginesConfig(num_processes=1)),
    "ahead, two processes": (AsyncConfig(max_staleness=1), EnginesConfig(num_processes=2)),
}


class Clock(RunCallback):
    """When each update was made."""

    def __init__(self) -> None:
        self.moments: list[float] = []
        self.last: StepReport | None = None

    def trained(self, report: StepReport) -> None:
        """An update was made."""
        self.moments.append(time.perf_counter())
        self.last = report


def run_of(model: Path, way: str, *, steps: int, prompts: int) -> RLRun:
    """`tiny-rl` with a few updates and as good as no held-out tasks."""
    run = tiny_rl()
    asynchronous, engines = WAYS[way]
    training = replace(
        run.training,
        steps=steps,
        batch_size=prompts * run.group_size,
        microbatch_size=run.group_size,
        evaluate_every_steps=steps,
        checkpoint_every_steps=steps,
    )
    return replace(
        run,
        name="overlap",
        model=str(model),
        training=training,
        asynchronous=asynchronous,
        engines=engines,
        held_out_tasks=1,
        final_held_out_tasks=1,
        log_rollouts_every_steps=steps,
    )


def updates_per_minute(run: RLRun) -> tuple[float, dict[str, float]]:
    """From the end of the first update to that of the last but one, which is followed by a look."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as runs:
        rl(run, runs=Path(runs), callback=clock)
    assert clock.last is not None
    counted = clock.moments[:-1]
    rate = 60 * (len(counted) - 1) / (counted[-1] - counted[0])
    names = (
        "perf/rollouts_s",
        "async/trainer_waited_s",
        "async/engine_waited_s",
        "policy/kept",
        "policy/current",
        "rollouts/tokens",
    )
    return rate, {name: clock.last.metrics.get(name, 0.0) for name in names}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a model directory that answers chats")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=36, help="of an update, of 8 rollouts each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    given = parser.parse_args(arguments)
    if given.steps < 4:
        parser.error("--steps must be 4 or more: the first and the last update do not count")
    before = machine.load_average()
    machine.warn_if_busy(before)
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    metrics: dict[str, dict[str, float]] = {}
    for order in turns(list(WAYS), rounds=given.rounds):
        for name in order:
            time.sleep(PAUSE_S)
            run = run_of(given.model, name, steps=given.steps, prompts=given.prompts)
            rate, metrics[name] = updates_per_minute(run)
            rates[name].append(rate)
            print(f"{name:>24}: {rate:6.1f} updates a minute", flush=True)
    ratios = {
        name: statistics.median(a / b for a, b in zip(rates[name], rates[BY_TURNS], strict=True))
        for name in WAYS
    }
    for name, ratio in ratios.items():
        print(f"{name:>24}: {statistics.median(rates[name]):6.1f} a minute, {ratio:.2f}x by turns")
    measured = {
        "steps": given.steps,
        "prompts": given.prompts,
        "updates_per_minute": rates,
        "ratio_to_turns": ratios,
        "last_update": metrics,
    }
    load = {"load_before": before, "load_after": machine.load_average()}
    machine.write_result("rl_overlap", measured, arguments=arguments, about=load, folder=given.out)


if __name__ == "__main__":
    main()
