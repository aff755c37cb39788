"""How many updates of 500 rollouts reinforcement learning makes in six minutes.

    python -m benchmarks.rl_rate runs/tiny-sft/model

Environments with short answers (under 20 tokens in the mean) and the nine of `tiny-rl`, each with
two engines in processes, by turns with the trainer and ahead of it. Every update plays 63
prompts 8 times, once: groups whose rewards are alike are not replaced, and only those that teach
something are trained. Beside it stands how fast the same machine pre-trains `tiny`, by which
machines can be compared, and what an update of the trainer takes, with a prompt computed once for
its group and with every rollout whole.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.rl_overlap import RESULTS, run_of, updates_per_minute
from benchmarks.sharing import work
from benchmarks.timing import PAUSE_S, turns

from benchmarks import machine
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.recipes.rl import RLRun, tiny_rl
from nemotron3.recipes.rl_engine import RolloutEngine
from nemotron3.recipes.rl_player import RunTasks
from nemotron3.rl.batches import policy_batches
from nemotron3.rl.policy_objective import PolicyObjective
from nemotron3.training.optimizers import AdamWConfig, build_optimizer
from nemotron3.training.step import TrainingStep

SHORT = ("multiple_choice", "lookup", "list_operations", "letter_counting", "over_refusal")
TASKS = {"short answers": SHORT, "tiny-rl": None}
WAYS = ("by turns, two processes", "ahead, two processes")
PROMPTS = 63
MINUTES = 6
GOAL_PRETRAINING = 7500
"""Tokens a second of pre-training `tiny` on a machine that should make 400 updates."""
UPDATES = 5


def rate_run(model: Path, tasks: str, way: str, *, steps: int) -> RLRun:
    """`tiny-rl` with these environments and updates of `PROMPTS` groups, played once."""
    run = run_of(model, way, steps=steps, prompts=PROMPTS)
    names = TASKS[tasks]
    chosen = [each for each in run.environments if names is None or each.name in names]
    training = replace(run.training, microbatch_size=tiny_rl().training.microbatch_size)
    return replace(run, environments=tuple(chosen), max_rounds=1, training=training)


def pretraining_rate(seconds: float = 10.0) -> float:
    """Tokens a second of pre-training `tiny` on all threads, after a warm-up."""
    some = work("training")
    for _ in range(3):
        some()
    start, tokens = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        tokens += some()
    return tokens / (time.perf_counter() - start)


def trainer_seconds(model: Path) -> dict[str, float]:
    """Seconds of the trainer for an update of `tiny-rl`, on all threads, medians."""
    run = rate_run(model, "tiny-rl", WAYS[0], steps=4)
    policy = LanguageModel.from_pretrained(model)
    with tempfile.TemporaryDirectory() as folder:
        tasks = RunTasks(run, folder=Path(folder))
        update = tasks.play(RolloutEngine(run, policy.eval(), tasks.environments), 0, say=print)
    step = TrainingStep(
        policy.train(),
        build_optimizer(policy, AdamWConfig(lr=1e-9)),
        PolicyObjective(run.loss),
        clip_grad_norm=1.0,
        bias_update_rate=0.0,
    )
    size = run.training.seq_len * run.training.microbatch_size
    batches = {
        name: policy_batches(
            update.trained, update.advantages, max_tokens=size, shares_prompts=shares
        )
        for name, shares in (("whole", False), ("shared", True))
    }
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    for order in turns(list(batches), rounds=UPDATES + 1):
        for name in order:
            start = time.perf_counter()
            step(batches[name], learning_rate=1e-9)
            seconds[name].append(time.perf_counter() - start)
    found = {name: statistics.median(each[1:]) for name, each in seconds.items()}
    tokens = {
        f"{name} tokens": float(sum(batch.segments.total for batch in each))
        for name, each in batches.items()
    }
    return found | tokens


def rate_table(result: dict[str, Any]) -> list[list[str]]:
    """Table rows: updates in six minutes, and in proportion to how fast the machine pre-trains."""
    pretraining = result["pretraining_tokens_per_s"]
    rows = [["", "tokens of an answer", f"updates in {MINUTES} minutes", "in proportion"]]
    for name, found in result["updates_per_minute"].items():
        updates = MINUTES * statistics.median(found)
        tokens = result["tokens_of_an_answer"][name.split(", ")[0]]
        proportional = updates * GOAL_PRETRAINING / pretraining
        rows.append([name, f"{tokens:.0f}", f"{updates:.0f}", f"{proportional:.0f}"])
    return rows


def rate_in_words(result: dict[str, Any]) -> str:
    """What stands beside the table."""
    trainer = result["trainer_seconds"]
    return (
        f"The machine pre-trained `tiny` at {result['pretraining_tokens_per_s']:,.0f} tokens/s; in "
        f"proportion is to {GOAL_PRETRAINING:,}. An update of the trainer takes "
        f"{trainer['shared']:.2f} s, and {trainer['whole']:.2f} s with every rollout whole."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a model directory that answers chats")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    given = parser.parse_args(arguments)
    if given.steps < 4:
        parser.error("--steps must be 4 or more: the first and the last update do not count")
    before = machine.load_average()
    machine.warn_if_busy(before)
    pretraining = pretraining_rate()
    print(f"pre-training: {pretraining:,.0f} tokens/s on {torch.get_num_threads()} threads")
    trainer = trainer_seconds(given.model)
    print(
        f"an update of the trainer: {trainer['shared']:.2f} s, with every rollout whole "
        f"{trainer['whole']:.2f} s ({trainer['whole'] / trainer['shared']:.2f}x)"
    )
    every = [(tasks, way) for tasks in TASKS for way in WAYS]
    rates: dict[str, list[float]] = {f"{tasks}, {way}": [] for tasks, way in every}
    tokens: dict[str, float] = {}
    for order in turns(every, rounds=given.rounds):
        for tasks, way in order:
            time.sleep(PAUSE_S)
            run = rate_run(given.model, tasks, way, steps=given.steps)
            rate, metrics = updates_per_minute(run)
            rates[f"{tasks}, {way}"].append(rate)
            tokens[tasks] = metrics["rollouts/tokens"]
    for name, found in rates.items():
        updates = MINUTES * statistics.median(found)
        print(
            f"{name}: {updates:.0f} updates of {PROMPTS * 8} rollouts in {MINUTES} minutes "
            f"({tokens[name.split(', ')[0]]:.1f} tokens an answer)"
        )
    measured = {
        "steps": given.steps,
        "rollouts_of_an_update": PROMPTS * 8,
        "pretraining_tokens_per_s": pretraining,
        "trainer_seconds": trainer,
        "updates_per_minute": rates,
        "tokens_of_an_answer": tokens,
    }
    load = {"load_before": before, "load_after": machine.load_average()}
    machine.write_result("rl_rate", measured, arguments=arguments, about=load, folder=given.out)


if __name__ == "__main__":
    main()
